"""Holding the filtered stream: one tweepy connection at a time, and a supervisor that decides what follows it.

The connection only moves bytes: every line goes to a bounded queue as it came. The supervisor owns the waits, the
connect budget and the verdict on errors. Neither knows what a line means or where it is stored.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import orjson
from tweepy.asynchronous import AsyncStreamingClient

from ingest.api import XApi
from ingest.backoff import Backoff, ConnectBudget, Failure
from ingest.options import RuleOption, StreamOptions
from ingest.waiting import until_true
from overtone import metrics
from overtone.errors import StreamError, StreamFatalError, StreamThrottledError
from overtone.logging import get_logger

_KILL_AGAIN_AFTER_S = 60.0
_MAX_PROBLEM_BYTES = 65_536
_SPEND_CAP = "spend_cap"

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Connected:
    """From here on the lines of a new connection follow."""

    at: datetime
    """No earlier than the moment the X API began to send, by its clock or by ours, whichever is later."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is over; what is published until the next `Connected` will not come by itself."""

    cause: str


StreamEvent = Connected | Disconnected | bytes
Inbox = asyncio.Queue[StreamEvent]


class LineSplitter:
    """Cuts a byte stream into lines; one longer than `max_bytes` is dropped whole and counted in `dropped`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._held = 0
        self._is_skipping = False
        self.dropped = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without their line ends."""
        lines: list[bytes] = []
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._hold(end)
            if not self._is_skipping:
                lines.append(b"".join(self._pieces).rstrip(b"\r"))
            self._is_skipping = False
            self._forget()
        self._hold(rest)
        return lines

    def _hold(self, piece: bytes) -> None:
        if self._is_skipping or not piece:
            return
        self._held += len(piece)
        if self._held > self._max_bytes:
            self._is_skipping = True
            self.dropped += 1
            self._forget()
        else:
            self._pieces.append(piece)

    def _forget(self) -> None:
        self._pieces, self._held = [], 0


class StreamConnection(AsyncStreamingClient):  # type: ignore[misc]
    """tweepy's streaming client for one connection: no second try, raw bytes out, every end a `StreamError`.

    tweepy's own loop reconnects without a pause after a clean end and stops for good on one bad line.
    """

    def __init__(self, api: XApi, token: str, inbox: Inbox, options: StreamOptions, opened: Callable[[], None]) -> None:
        super().__init__(token, return_type=dict)
        self._opened = opened
        self._gate = api.gate
        self._base_url = api.base_url
        self._inbox = inbox
        self._options = options
        self.status: int | None = None
        """HTTP status of the answer, None before there is one."""
        self.headers: Mapping[str, str] = {}

    async def _connect(self, method: str, endpoint: str, params: Any = None, **_: Any) -> None:
        url = f"{self._base_url}/2/tweets/{endpoint}/stream"
        headers = {"Authorization": f"Bearer {self.bearer_token}", "User-Agent": self.user_agent}
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._options.connect_timeout_s, sock_read=self._options.stall_s
        )
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(method, url, params=params, headers=headers) as response,
            ):
                await self._read(response)
        except TimeoutError as error:
            what = "no answer in time" if self.status is None else f"nothing came for {self._options.stall_s:g} s"
            raise StreamError(what, cause="stall") from error
        except (aiohttp.ClientError, OSError) as error:
            raise StreamError(f"the connection broke: {type(error).__name__}", cause="network") from error

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        self.status, self.headers = response.status, response.headers
        if response.status != 200:
            raise refusal(response.status, response.headers, await response.content.read(_MAX_PROBLEM_BYTES))
        await self.on_connect()
        await self._inbox.put(Connected(_began_at(response.headers)))
        splitter = LineSplitter(self._options.max_line_bytes)
        async for chunk in response.content.iter_any():
            for line in splitter.feed(chunk):
                if line:
                    await self.on_data(line)
            if splitter.dropped:
                metrics.DEAD_LETTERS.labels("line_too_long").inc(splitter.dropped)
                _log.error("stream.line_dropped", limit_bytes=self._options.max_line_bytes)
                splitter.dropped = 0
        raise StreamError("the X API closed the stream", cause="closed")

    async def on_connect(self) -> None:
        """Tell the owner, once the X API has begun to send."""
        self._opened()
        _log.info("stream.connected", base_url=self._base_url)

    async def on_data(self, raw_data: bytes) -> None:
        """Queue the line; with the queue full, give the connection up rather than slow the reader down."""
        if b'"data"' in raw_data:
            self._gate.count(1)
        try:
            self._inbox.put_nowait(raw_data)
        except asyncio.QueueFull:
            raise StreamError("posts come faster than they can be stored", cause="overflow") from None


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
        rules: Sequence[RuleOption],
        fields: Mapping[str, Sequence[str]],
        options: StreamOptions,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        self.status = StreamStatus()
        self._api = api
        self._token = token
        self._rules = rules
        self._fields = {name: list(values) for name, values in fields.items() if values}
        self._options = options
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._budget = ConnectBudget(clock, limit=options.connects_per_window)
        self._killed_at = float("-inf")
        self._rules_are_right = False

    async def run(self, inbox: Inbox) -> None:
        """Fill `inbox` for ever.

        Raises:
            StreamFatalError: the X API refuses the token, a rule or the request, or the spend cap is reached.
        """
        while True:
            await self._until_allowed()
            await self._wait(self._budget.wait_s(), "budget")
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
            await self._wait(await self._pause_after(error), cause)

    async def _one_life(self, inbox: Inbox) -> tuple[StreamError, bool]:
        connection = StreamConnection(self._api, self._token, inbox, self._options, self._note_opened)
        error: StreamError
        try:
            if not self._rules_are_right:
                await self._api.reconcile_rules(self._rules)
                self._rules_are_right = True
            error = await self._hold(connection)
        except StreamError as stream_error:
            error = stream_error
        finally:
            self.status.is_connected = False
        was_connected = connection.status == 200
        if connection.status is not None:
            self._budget.spend()
            self._learn(connection.headers)
        outcome = "connected" if was_connected else str(connection.status or "unreachable")
        metrics.STREAM_CONNECTS.labels(outcome).inc()
        return error, was_connected

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
        """Drop the connection X still counts, at most once a minute: two clients must not fight over it."""
        if self._clock() - self._killed_at < _KILL_AGAIN_AFTER_S:
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

    def _learn(self, headers: Mapping[str, str]) -> None:
        try:
            remaining = int(headers["x-rate-limit-remaining"])
            reset = int(headers["x-rate-limit-reset"])
        except (KeyError, ValueError):
            return
        self._budget.learn(remaining, reset - time.time())


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> StreamError:
    """What an answer other than 200 to the connect means."""
    problem = _problem(body)
    title = str(problem.get("title") or "")
    detail = str(problem.get("detail") or title or "no reason given")
    if status in (400, 401, 403):
        what = "the bearer token" if status != 400 else "the request"
        return StreamFatalError(f"the X API refuses {what} ({status}): {detail}", status=status, cause="refused")
    if status == 429:
        if title == "UsageCapExceeded":
            return StreamFatalError(f"the spend cap is reached: {detail}", status=status, cause="usage_cap")
        if problem.get("connection_issue") == "TooManyConnections":
            return StreamThrottledError(detail, status=status, cause="too_many_connections", retry_after_s=0.0)
        return StreamThrottledError(
            f"the X API asks to wait: {detail}", status=status, cause="rate_limit", retry_after_s=_reset_in_s(headers)
        )
    return StreamError(f"the X API answers {status}: {detail}", status=status, cause=f"http_{status}")


def _problem(body: bytes) -> dict[str, Any]:
    try:
        loaded = orjson.loads(body)
    except ValueError:
        return {}
    if not isinstance(loaded, dict):
        return {}
    errors = loaded.get("errors")
    if "title" not in loaded and isinstance(errors, list) and errors and isinstance(errors[0], dict):
        first = errors[0]
        return {**first, "detail": first.get("detail") or first.get("message")}
    return loaded


def _reset_in_s(headers: Mapping[str, str]) -> float:
    try:
        return max(int(headers["x-rate-limit-reset"]) - time.time(), 0.0)
    except (KeyError, ValueError):
        return 0.0


def _began_at(headers: Mapping[str, str]) -> datetime:
    now = datetime.now(UTC)
    try:
        # The header counts whole seconds: the true time may be almost one later.
        there = parsedate_to_datetime(headers["Date"]) + timedelta(seconds=1)
    except (KeyError, ValueError, TypeError):
        return now
    if there.tzinfo is None:
        there = there.replace(tzinfo=UTC)
    return max(now, there)
