"""Scores of texts that were classified before, by exact match, in this process or in Redis.

A key is a digest of the normalised text, the bundle's version and the policy for long texts: no text is kept, so
erasing one needs nothing here, and another bundle never meets scores that are not its own.
"""

import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from overtone import metrics
from overtone.logging import get_logger
from overtone.text import normalise
from serve.longtext import LongText
from serve.model import Scores

_PREFIX = b"overtone:scores:"
_TIMEOUT_S = 0.05
_REST_S = 5.0
"""How long a Redis that failed is left alone."""

_HITS, _MISSES, _SKIPPED = (metrics.CACHE_TEXTS.labels(outcome) for outcome in ("hit", "miss", "skipped"))


class Cache(Protocol):
    """Scores by key. Neither call raises."""

    async def find(self, keys: Sequence[bytes]) -> list[Scores | None]:
        """The scores under each key, None where there are none."""
        ...

    async def keep(self, found: Sequence[tuple[bytes, Scores]]) -> None:
        """Remember scores."""
        ...

    async def close(self) -> None:
        """Free connections."""
        ...


def key_of(text: str, version: str, long_text: LongText) -> bytes:
    """The key of one text: 16 bytes."""
    # `normalise` looks at text alone, so half a surrogate pair may still be in it.
    content = f"{version}\0{long_text}\0{normalise(text)}".encode("utf-8", "surrogatepass")
    return blake2b(content, digest_size=16).digest()


class MemoryCache:
    """The `entries` texts that were asked for last, about 350 bytes each."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._kept: OrderedDict[bytes, Scores] = OrderedDict()

    async def find(self, keys: Sequence[bytes]) -> list[Scores | None]:
        """See `Cache.find`."""
        found = [self._kept.get(key) for key in keys]
        for key, scores in zip(keys, found, strict=True):
            if scores is not None:
                self._kept.move_to_end(key)
        _count(found)
        return found

    async def keep(self, found: Sequence[tuple[bytes, Scores]]) -> None:
        """See `Cache.keep`."""
        self._kept.update(found)
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)

    async def close(self) -> None:
        """See `Cache.close`."""
        self._kept.clear()


class RedisCache:
    """One Redis for all replicas. While it is away every text is a miss, and it is asked again after a rest."""

    def __init__(self, url: str, *, ttl_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is connected yet."""
        self._redis = _client(url)
        self._ttl_s = ttl_s
        self._clock = clock
        self._rests_until = 0.0

    async def find(self, keys: Sequence[bytes]) -> list[Scores | None]:
        """See `Cache.find`."""
        if not self._is_resting:
            try:
                found = [_unpack(value) for value in await self._redis.mget([_PREFIX + key for key in keys])]
                _count(found)
                return found
            except (RedisError, OSError, TimeoutError) as error:
                self._rest(error)
        _SKIPPED.inc(len(keys))
        return [None] * len(keys)

    async def keep(self, found: Sequence[tuple[bytes, Scores]]) -> None:
        """See `Cache.keep`."""
        if self._is_resting or not found:
            return
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key, scores in found:
                    pipeline.set(_PREFIX + key, struct.pack(f"<{len(scores)}d", *scores), ex=self._ttl_s)
                await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._rest(error)

    async def move_to(self, url: str) -> None:
        """Use the Redis at `url` from now on."""
        old, self._redis = self._redis, _client(url)
        self._rests_until = 0.0
        with suppress(RedisError, OSError):
            await old.aclose()

    async def close(self) -> None:
        """See `Cache.close`."""
        with suppress(RedisError, OSError):
            await self._redis.aclose()

    @property
    def _is_resting(self) -> bool:
        return self._clock() < self._rests_until

    def _rest(self, error: Exception) -> None:
        self._rests_until = self._clock() + _REST_S
        get_logger().warning("cache.away", reason=type(error).__name__, rest_s=_REST_S)


def _client(url: str) -> Redis:
    return Redis.from_url(
        url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, max_connections=16, retry=None
    )


def _unpack(value: bytes | str | None) -> Scores | None:
    # Whatever else writes there: a value that is not one of ours is none.
    return (
        list(struct.unpack(f"<{len(value) // 8}d", value))
        if isinstance(value, bytes) and value and len(value) % 8 == 0
        else None
    )


def _count(found: Sequence[Scores | None]) -> None:
    hits = sum(scores is not None for scores in found)
    _HITS.inc(hits)
    _MISSES.inc(len(found) - hits)
