"""How many connections to a stream may still be made: counted over all processes that read it, and over their ends.

X counts 50 requests in any 15 minutes, whoever makes them. A process that is killed again and again would start with a
fresh budget each time, so each request is written down before it is made. While the database is away the count in
memory goes on alone, and what it missed is written down with the next request.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from ingest.backoff import ConnectBudget
from overtone.db.connects import connects_since, forget_connect, note_connect
from overtone.db.database import Database
from overtone.errors import DatabaseUnavailableError
from overtone.logging import get_logger

_WINDOW = timedelta(minutes=15)
_PATIENCE_S = 1.0
"""How long a connection waits for the database to write it down."""

_log = get_logger()
T = TypeVar("T")


class ConnectLog:
    """The requests for `stream` that the database knows of. Nothing here waits long or raises."""

    def __init__(self, db: Database, stream: str) -> None:
        self._db = db
        self._stream = stream
        self._unwritten: list[datetime] = []

    async def ages_s(self) -> list[float] | None:
        """How many seconds ago each request of the last window was made; None while the database is away."""
        now = datetime.now(UTC)
        found = await _soon(connects_since(self._db, self._stream, now - _WINDOW))
        return None if found is None else [max((now - one).total_seconds(), 0.0) for one in (*found, *self._unwritten)]

    async def note(self) -> int | None:
        """Write a request down; its number, by which it can be taken back."""
        self._unwritten.append(datetime.now(UTC))
        written = None
        while self._unwritten:
            written = await _soon(note_connect(self._db, self._stream, self._unwritten[0], keep=_WINDOW))
            if written is None:
                return None
            del self._unwritten[0]
        return written

    async def forget(self, number: int | None) -> None:
        """Take a request back."""
        if number is None:
            del self._unwritten[-1:]
        else:
            await _soon(forget_connect(self._db, number))


class Connects:
    """The allowance of one stream, for its live connection and for replays alike."""

    def __init__(
        self, limit: int, log: ConnectLog | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Without `log` the count begins and ends with this process."""
        self._budget = ConnectBudget(clock, limit=limit, window_s=_WINDOW.total_seconds())
        self._log = log
        self._is_loaded = log is None

    async def until_allowed(self, wait: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Return when the next request may be made; `wait` waits so many seconds."""
        if not self._is_loaded and self._log is not None:
            ages_s = await self._log.ages_s()
            if ages_s is not None:
                self._budget.remember(ages_s)
                self._is_loaded = True
        while (wait_s := self._budget.wait_s()) > 0:
            await wait(wait_s)

    async def take(self) -> int | None:
        """Count a request that is about to be made; the number by which to give it back."""
        self._budget.spend()
        return None if self._log is None else await self._log.note()

    async def give_back(self, number: int | None) -> None:
        """The request never reached X."""
        self._budget.give_back()
        if self._log is not None:
            await self._log.forget(number)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Obey what X says about its own count."""
        try:
            remaining = int(headers["x-rate-limit-remaining"])
            reset = int(headers["x-rate-limit-reset"])
        except (KeyError, ValueError):
            return
        self._budget.learn(remaining, reset - time.time())


async def _soon(work: Awaitable[T]) -> T | None:
    """The result of `work`; None when the database does not give it soon."""
    try:
        return await asyncio.wait_for(work, _PATIENCE_S)
    except (DatabaseUnavailableError, TimeoutError) as error:
        _log.warning("stream.connects_not_counted", reason=type(error).__name__)
        return None
