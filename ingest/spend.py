"""The meter of posts read from X, each of which is billed, and the gate that it closes before the cap is reached.

Posts are counted as they come off the wire, so the gate closes in time even while the database is away. The count is
written down every few seconds; a process that is killed forgets no more than that, and X's own count, which is asked
for every hour, makes up for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from ingest.options import SpendOptions
from overtone import metrics
from overtone.db.database import Database
from overtone.db.usage import DayOfUse, add_usage, usage_since
from overtone.errors import DatabaseUnavailableError, StreamError
from overtone.logging import get_logger

_WRITE_EVERY_S = 5.0
_ASK_EVERY_S = 3_600.0
_RECENT_DAYS = 7

_log = get_logger()

AskX = Callable[[], Awaitable[tuple[int, int | None]]]
"""Posts that X counts in this period, and its cap."""


class Gate:
    """Whether posts may be read. Open, unless somebody closes it."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._closed = asyncio.Event()
        self._opened.set()

    @property
    def is_open(self) -> bool:
        """Whether posts may be read now."""
        return self._opened.is_set()

    def turn(self, *, is_open: bool) -> None:
        """Open or close it."""
        now, then = (self._opened, self._closed) if is_open else (self._closed, self._opened)
        now.set()
        then.clear()

    def count(self, posts: int) -> None:
        """Say that `posts` were read."""

    async def until_open(self) -> None:
        """Return once posts may be read."""
        await self._opened.wait()

    async def until_closed(self) -> None:
        """Return once posts may no longer be read."""
        await self._closed.wait()


class SpendMeter(Gate):
    """Counts posts of `resource`, and closes when `stop_at` of the cap is used up until the period is over."""

    def __init__(
        self,
        db: Database,
        resource: str,
        options: SpendOptions,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__()
        self._db = db
        self._resource = resource
        self._options = options
        self._clock = clock
        self._cap = options.monthly_posts
        self._unwritten: dict[date, int] = {}
        self._first_day = period_of(clock().date(), options.resets_on_day)[0]
        self._used = 0
        self._is_near = False

    @property
    def used(self) -> int:
        """Posts read in this period."""
        return self._used

    @property
    def cap(self) -> int | None:
        """Posts that may be read in a period; None when nobody set a limit."""
        return self._cap

    def count(self, posts: int) -> None:
        """Count `posts`; the gate closes at once if these were the last."""
        day = self._clock().date()
        self._unwritten[day] = self._unwritten.get(day, 0) + posts
        self._used += posts
        self._judge()

    async def run(self, ask_x: AskX | None = None) -> None:
        """Write down what was counted, and learn what others and, with `ask_x`, X counted, until cancelled."""
        asked_at = float("-inf")
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self.write()
                if ask_x is not None and loop.time() - asked_at >= _ASK_EVERY_S:
                    asked_at = loop.time()
                    await self._learn(ask_x)
            except DatabaseUnavailableError:
                pass  # the writer says so; what was counted waits here
            except StreamError as error:
                _log.warning("spend.x_not_asked", reason=error.message)
            await asyncio.sleep(_WRITE_EVERY_S)

    async def write(self) -> None:
        """Write down what was counted, and read what all have counted in this period.

        Raises:
            DatabaseUnavailableError: what was not written is still counted here.
        """
        for day in list(self._unwritten):
            count = self._unwritten[day]
            await add_usage(self._db, self._resource, day, count, Decimal(count) * self._price)
            self._unwritten[day] -= count
            if not self._unwritten[day]:
                del self._unwritten[day]
        first, _ = period_of(self._clock().date(), self._options.resets_on_day)
        written = sum(one.count for one in await usage_since(self._db, first, self._resource))
        is_new_period = first != self._first_day
        self._first_day = first
        total = written + sum(self._unwritten.values())
        # X may have counted more than was written down here: only a new period lowers what is known.
        self._used = total if is_new_period else max(self._used, total)
        self._judge()

    @property
    def _price(self) -> Decimal:
        return Decimal(str(self._options.post_usd))

    async def _learn(self, ask_x: AskX) -> None:
        used, cap = await ask_x()
        self._used = max(self._used, used)
        if self._options.monthly_posts is None:
            self._cap = cap
        self._judge()

    def _judge(self) -> None:
        metrics.SPEND_POSTS.set(self._used)
        metrics.SPEND_CAP_POSTS.set(self._cap or 0)
        if self._cap is None:
            return
        is_near = self._used >= self._cap * self._options.warn_at
        if is_near and not self._is_near:
            _log.warning("spend.nearly_used", used=self._used, cap=self._cap)
        self._is_near = is_near
        is_open = self._used < self._cap * self._options.stop_at
        if is_open != self.is_open:
            self.turn(is_open=is_open)
            _, end = period_of(self._clock().date(), self._options.resets_on_day)
            if is_open:
                _log.info("spend.resumed", used=self._used, cap=self._cap)
            else:
                _log.error("spend.stopped", used=self._used, cap=self._cap, until=str(end))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a period has cost, and will have if it goes on as in the last days."""

    first_day: date
    next_period: date
    today: int
    used: int
    cost_usd: Decimal
    projected: int
    projected_usd: Decimal


def forecast(days: Sequence[DayOfUse], today: date, resets_on_day: int, post_usd: float) -> Forecast:
    """The figures of the period of `today`; `days` are of one resource and reach a week back at least."""
    first, end = period_of(today, resets_on_day)
    of_period = [one for one in days if first <= one.day <= today]
    used = sum(one.count for one in of_period)
    cost = sum((one.cost_usd for one in of_period), Decimal(0))
    recent = [one for one in days if today - timedelta(days=_RECENT_DAYS) <= one.day < today]
    so_far = sum(one.count for one in days if one.day == today)
    known_days = (today - min(one.day for one in recent)).days if recent else 0
    per_day = sum(one.count for one in recent) / known_days if known_days else float(so_far)
    more = int(per_day * (end - today - timedelta(days=1)).days + max(per_day - so_far, 0.0))
    projected_usd = cost + more * Decimal(str(post_usd))
    return Forecast(first, end, so_far, used, cost, used + more, projected_usd)


def period_of(day: date, resets_on_day: int) -> tuple[date, date]:
    """The first day of the period that holds `day`, and of the one after it. `resets_on_day` is 1 to 28."""
    first = day.replace(day=resets_on_day)
    if first > day:
        first = (first.replace(day=1) - timedelta(days=1)).replace(day=resets_on_day)
    return first, (first.replace(day=28) + timedelta(days=4)).replace(day=resets_on_day)
