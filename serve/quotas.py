"""How much a caller may ask for: requests and texts a minute, texts a day, each over a sliding window.

Counts are kept in this process, or in Redis so that all replicas share them. Without Redis each replica grants its
share, the limit divided by the number of replicas. A Redis that does not answer costs accuracy and never an error: the
replica counts by itself until it answers again.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from overtone.errors import QuotaExceededError, TooLargeError
from overtone.logging import get_logger

_REDIS_TIMEOUT_S = 0.25
_REDIS_CONNECTIONS = 32
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits of one account; 0 is without limit."""

    requests_per_minute: int = 0
    texts_per_minute: int = 0
    texts_per_day: int = 0

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute or self.texts_per_minute or self.texts_per_day)


@dataclass(frozen=True, slots=True)
class Window:
    """The state of one limit: what was used in the past window and in the present one, in its unit."""

    limit: int
    length_s: float
    past: int
    past_left_s: float
    """How much of the past window still lies within the sliding one, in seconds."""
    present: int
    present_left_s: float
    """Until the present window becomes the past one, in seconds."""

    @property
    def remaining(self) -> int:
        """How much may be used now."""
        return max(0, self.limit - math.floor(self.past * self.past_left_s / self.length_s + self.present))

    def wait_s(self, cost: int) -> float:
        """Seconds until `cost`, at most the limit, may be used if nothing else is; 0 when it may be now."""
        free = self.limit - cost
        if self.past and self.present <= free:
            # The past window slides out at an even rate.
            wait_s = self.past_left_s - (free - self.present) * self.length_s / self.past
            return max(0.0, wait_s)
        if self.present <= free:
            return 0.0
        return self.present_left_s + self.length_s * (1 - free / self.present)


@dataclass(frozen=True, slots=True)
class _Limit:
    name: str
    item: RateLimitItem
    counts_texts: bool


class Quotas:
    """The counts of every account."""

    def __init__(
        self, redis_url: str | None = None, *, retry_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing is connected yet. A Redis that failed is asked again after `retry_s`."""
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._pool = _pool(redis_url) if redis_url else None
        self._common = _common(self._pool) if self._pool else None
        self._retry_s = retry_s
        self._clock = clock
        self._down_until: float | None = None
        self._replicas = 1
        self._newest: dict[str, tuple[tuple[str, Window], ...]] = {}

    def share_among(self, replicas: int) -> None:
        """Tell between how many replicas the limits are divided where there is no Redis."""
        self._replicas = max(1, replicas)

    async def spend(self, account: str, allowance: Allowance, texts: int) -> None:
        """Count one request of `texts` texts.

        Raises:
            QuotaExceededError: a limit is used up; it says for how long.
            TooLargeError: the request alone holds more texts than a limit allows in its whole window.
        """
        limits = _limits(allowance)
        for limit in limits:
            if limit.counts_texts and texts > limit.item.amount:
                raise TooLargeError(
                    f"The request holds {texts} texts; this key may send {limit.item.amount} {_per(limit)}."
                    " Send fewer at once."
                )
        if self._common is not None and (self._down_until is None or self._clock() >= self._down_until):
            try:
                await self._count(self._common, account, limits, texts)
            except StorageError as error:
                self._note_down(error)
            else:
                self._note_up()
                return
        await self._count(self._own, account, _limits(allowance, self._replicas), texts)

    def headers(self, account: str, allowance: Allowance) -> list[tuple[bytes, bytes]]:
        """`RateLimit-Policy` and `RateLimit` for an answer to `account`."""
        policy = ", ".join(
            f'"{limit.name}";q={limit.item.amount};w={limit.item.get_expiry()}' for limit in _limits(allowance)
        )
        found = [(b"ratelimit-policy", policy.encode("ascii"))]
        newest = self._newest.get(account)
        if newest:
            state = ", ".join(
                f'"{name}";r={window.remaining};t={math.ceil(window.present_left_s)}' for name, window in newest
            )
            found.append((b"ratelimit", state.encode("ascii")))
        return found

    async def move_to(self, redis_url: str) -> None:
        """Count in the Redis at `redis_url` from now on. What is under way there is counted here."""
        old, self._pool = self._pool, _pool(redis_url)
        self._common = _common(self._pool)
        self._down_until = None
        if old is not None:
            await old.disconnect()

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            await self._pool.disconnect()

    async def _count(
        self, counters: SlidingWindowCounterRateLimiter, account: str, limits: tuple[_Limit, ...], texts: int
    ) -> None:
        states: list[tuple[str, Window]] = []
        refused: tuple[_Limit, Window, int] | None = None
        for limit in limits:
            # A request that fits the whole limit may be over one replica's share of it.
            cost = min(texts, limit.item.amount) if limit.counts_texts else 1
            is_granted = refused is not None or not cost or await counters.hit(limit.item, account, cost=cost)
            window = await _window(counters, limit.item, account)
            states.append((limit.name, window))
            if not is_granted:
                refused = limit, window, cost
        self._remember(account, tuple(states))
        if refused is not None:
            limit, window, cost = refused
            raise QuotaExceededError(
                f"The limit of this key, {limit.name} {_per(limit)}, is used up.",
                retry_after_s=max(1.0, window.wait_s(cost)),
            )

    def _remember(self, account: str, states: tuple[tuple[str, Window], ...]) -> None:
        if len(self._newest) >= _MAX_REMEMBERED and account not in self._newest:
            del self._newest[next(iter(self._newest))]
        self._newest[account] = states

    def _note_down(self, error: StorageError) -> None:
        if self._down_until is None:
            get_logger().warning("quotas.redis_lost", reason=type(error.storage_error).__name__)
        self._down_until = self._clock() + self._retry_s

    def _note_up(self) -> None:
        if self._down_until is not None:
            get_logger().info("quotas.redis_found")
            self._down_until = None


@cache
def _limits(allowance: Allowance, share: int = 1) -> tuple[_Limit, ...]:
    """The limits that `allowance` sets, each divided by `share` and rounded up."""
    wanted = (
        ("requests", RateLimitItemPerMinute, allowance.requests_per_minute, False),
        ("texts", RateLimitItemPerMinute, allowance.texts_per_minute, True),
        ("texts-day", RateLimitItemPerDay, allowance.texts_per_day, True),
    )
    return tuple(
        _Limit(name, kind(math.ceil(amount / share), namespace=f"overtone-{name}"), counts_texts)
        for name, kind, amount, counts_texts in wanted
        if amount
    )


def _per(limit: _Limit) -> str:
    return "a day" if isinstance(limit.item, RateLimitItemPerDay) else "a minute"


async def _window(counters: SlidingWindowCounterRateLimiter, item: RateLimitItem, account: str) -> Window:
    length_s = item.get_expiry()
    storage = counters.storage
    assert isinstance(storage, MemoryStorage | RedisStorage)
    past, past_left_s, present, present_left_s = await storage.get_sliding_window(item.key_for(account), length_s)
    # The lifetime of the present counter is two windows long.
    return Window(item.amount, length_s, past, past_left_s, present, present_left_s % length_s)


def _pool(url: str) -> BlockingConnectionPool:
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        url,
        max_connections=_REDIS_CONNECTIONS,
        timeout=_REDIS_TIMEOUT_S,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    return pool


def _common(pool: BlockingConnectionPool) -> SlidingWindowCounterRateLimiter:
    options: dict[str, Any] = {"connection_pool": pool}
    # The address only chooses the client: the pool knows where to connect to.
    storage = RedisStorage(
        "async+redis://", wrap_exceptions=True, implementation="redispy", key_prefix="overtone", **options
    )
    return SlidingWindowCounterRateLimiter(storage)
