"""Holding a stream: one connection at a time, and a supervisor that decides what follows it.

The connection only moves bytes: every line goes to a bounded queue as it came. The supervisor owns the waits, the
connect budget and the verdict on errors. Neither knows what a line means or where it is stored.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from ingest.api import XApi
from ingest.backoff import Backoff, Failure
from ingest.connection import Disconnected, Inbox, StreamConnection
from ingest.connects import Connects
from ingest.options import IngestOptions
from ingest.waiting import until_true
from overtone import metrics
from overtone.errors import StreamError, StreamFatalError, StreamThrottledError
from overtone.logging import get_logger

_KILL_AGAIN_AFTER_S = 60.0
_LOOK_EVERY_S = 0.1
_MAX_BACKFILL_MINUTES = 5
_OVERLAP = timedelta(seconds=30)
"""How far before the last byte X is asked to begin: posts come late and out of order by seconds."""
_SPEND_CAP = "spend_cap"

_log = get_logger()


@dataclass(slots=True)
class StreamStatus:
    """What the supervisor is doing, for people."""

    is_connected: bool = False
    connects: int = 0
    last_error: str | None = None
    waiting_s: float = 0.0
    """How long the present wait before the next attempt is."""


class StreamSupervisor:
    """Keeps the stream connected and `inbox` filled until cancelled or refused for good.

    It never ends silently: the only ways out of `run` are cancellation and `StreamFatalError`.
    """

    def __init__(
        self,
        api: XApi,
        token: str,
        *,
        options: IngestOptions,
        connects: Connects | None = None,
        missed_since: datetime | None = None,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        """Where the plan has it, X is asked to send again what it published since the last connection, or for the first
        since `missed_since`, if that is no more than five minutes.
        """
        self.status = StreamStatus()
        self._api = api
        self._token = token
        self._rules = options.rules
        self._fields = options.fields
        self._options = options.stream
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._connects = connects or Connects(options.stream.connects_per_window, clock=clock)
        self._missed_since = missed_since
        self._has_backfill = options.plan == "enterprise"
        self._killed_at = float("-inf")
        self._rules_are_right = False

    def use_token(self, token: str) -> None:
        """Connect with `token` from the next time on."""
        self._token = token

    async def run(self, inbox: Inbox) -> None:
        """Fill `inbox` for ever.

        Raises:
            StreamFatalError: the X API refuses the token, a rule or the request, or the spend cap is reached.
        """
        while True:
            await self._until_allowed()
            await self._connects.until_allowed(partial(self._wait, why="budget"))
            began = self._clock()
            error, was_connected = await self._one_life(inbox)
            if isinstance(error, StreamFatalError):
                raise error
            if was_connected and self._clock() - began >= self._options.stable_s:
                self._backoff.reset()
            cause = str(error.details.get("cause") or error.code)
            self.status.last_error = error.message
            _log.warning("stream.disconnected", cause=cause, reason=error.message, was_connected=was_connected)
            if was_connected:
                await inbox.put(Disconnected(cause))
            await until_true(lambda: inbox.qsize() <= inbox.maxsize // 2, every_s=0.1)
            await self._until_sure()
            await self._wait(await self._pause_after(error), cause)

    async def _one_life(self, inbox: Inbox) -> tuple[StreamError, bool]:
        connection = StreamConnection(
            self._api, self._token, inbox, self._options, opened=self._note_opened, span=self._span()
        )
        error: StreamError
        number: int | None = None
        is_counted = False
        try:
            if not self._rules_are_right and self._options.has_rules:
                await self._api.reconcile_rules(self._rules)
                self._rules_are_right = True
            number, is_counted = await self._connects.take(), True
            error = await self._hold(connection)
        except StreamError as stream_error:
            error = stream_error
        finally:
            self.status.is_connected = False
        was_connected = connection.status == 200
        if was_connected:
            self._missed_since = connection.heard_at
        if connection.status is not None:
            self._connects.learn(connection.headers)
        elif is_counted:
            await self._connects.give_back(number)
        outcome = "connected" if was_connected else str(connection.status or "unreachable")
        metrics.STREAM_CONNECTS.labels(outcome).inc()
        return error, was_connected

    def _span(self) -> dict[str, str]:
        """What the next connection is to send again."""
        if not self._has_backfill or self._missed_since is None:
            return {}
        minutes = math.ceil((datetime.now(UTC) - self._missed_since + _OVERLAP).total_seconds() / 60)
        return {"backfill_minutes": str(minutes)} if minutes <= _MAX_BACKFILL_MINUTES else {}

    async def _hold(self, connection: StreamConnection) -> StreamError:
        """Keep the connection until it ends, and say why it did."""
        task: asyncio.Task[None] = connection.filter(**self._fields)
        closed = asyncio.create_task(self._api.gate.until_closed())
        try:
            await asyncio.wait({task, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return StreamError("as many posts were read as the cap allows", cause=_SPEND_CAP)
            task.result()
        except StreamError as error:
            return error
        except Exception as error:  # a defect here must cost one connection, never the stream
            _log.exception("stream.failed")
            return StreamError(f"reading the stream failed: {type(error).__name__}", cause="failed")
        finally:
            task.cancel()
            closed.cancel()
            await asyncio.gather(task, closed, return_exceptions=True)
        return StreamError("the stream ended", cause="closed")

    async def _until_allowed(self) -> None:
        if not self._api.gate.is_open:
            self.status.last_error = "as many posts were read as the cap allows; reading goes on in the next period"
            await self._api.gate.until_open()

    async def _until_sure(self) -> None:
        """Wait long before another connection for as long as another process may lead: where a new connection ends an
        older one, two leaders would take it from each other again and again.
        """
        if self._api.is_sure():
            return
        wait_s = self._backoff.next_s(Failure.THROTTLED)
        self.status.waiting_s = wait_s
        _log.info("stream.waiting", wait_s=round(wait_s, 2), why="unsure to lead")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await until_true(self._api.is_sure, every_s=_LOOK_EVERY_S)

    def _note_opened(self) -> None:
        self.status.is_connected = True
        self.status.connects += 1
        self.status.waiting_s = 0.0

    async def _pause_after(self, error: StreamError) -> float:
        """Put right what can be put right, and return the seconds to wait."""
        status = error.details.get("status")
        if status == 409:
            # No rules: a new app, or a simulator that was started again.
            self._rules_are_right = False
            return self._backoff.next_s(Failure.NETWORK)
        if isinstance(error, StreamThrottledError):
            if error.details.get("cause") == "too_many_connections" and await self._kill_stale():
                return self._backoff.next_s(Failure.NETWORK)
            return self._backoff.next_s(Failure.THROTTLED, error.details.get("retry_after_s") or 0.0)
        return self._backoff.next_s(Failure.NETWORK if status is None else Failure.HTTP)

    async def _kill_stale(self) -> bool:
        """Drop the connection X still counts, at most once a minute: two clients must not fight over it.

        Of a stream in partitions X cannot be told whose connection is stale.
        """
        if not self._options.has_rules or self._clock() - self._killed_at < _KILL_AGAIN_AFTER_S:
            return False
        self._killed_at = self._clock()
        try:
            await self._api.end_stale_connections()
        except StreamError as error:
            _log.warning("stream.stale_connection_kept", reason=error.message)
            return False
        _log.info("stream.stale_connection_ended")
        return True

    async def _wait(self, wait_s: float, why: str) -> None:
        if wait_s <= 0:
            return
        self.status.waiting_s = wait_s
        _log.info("stream.waiting", wait_s=round(wait_s, 2), why=why)
        await asyncio.sleep(wait_s)
