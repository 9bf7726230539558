"""One connection to a stream of the X API, through tweepy: bytes in, lines out, every end a `StreamError`.

It knows neither what a line means nor what follows when it is over.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import orjson
from tweepy.asynchronous import AsyncStreamingClient

from ingest.api import XApi
from ingest.options import StreamOptions
from overtone.errors import StreamError, StreamFatalError, StreamThrottledError
from overtone.logging import get_logger

_MAX_PROBLEM_BYTES = 65_536
_HEAD_BYTES = 65_536
"""What is kept of a line that is too long."""

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Connected:
    """From here on the lines of a new connection follow."""

    at: datetime
    """No earlier than the moment the X API began to send, by its clock or by ours, whichever is later."""
    is_backfilled: bool = False
    """X sends again what it published since the last connection."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is over; what is published until the next `Connected` will not come by itself."""

    cause: str


StreamEvent = Connected | Disconnected | bytes
Inbox = asyncio.Queue[StreamEvent]


class LineSplitter:
    """Cuts a byte stream into lines. One longer than `max_bytes` is counted in `cut` and comes as its beginning alone:
    that holds no whole post, so it ends among the dead letters like any other line that cannot be read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._held = 0
        self._is_skipping = False
        self.cut = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without their line ends."""
        lines: list[bytes] = []
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._hold(end)
            lines.append(b"".join(self._pieces).rstrip(b"\r"))
            self._pieces, self._held, self._is_skipping = [], 0, False
        self._hold(rest)
        return lines

    def _hold(self, piece: bytes) -> None:
        if self._is_skipping or not piece:
            return
        self._held += len(piece)
        self._pieces.append(piece)
        if self._held > self._max_bytes:
            self._is_skipping = True
            self.cut += 1
            self._pieces = [b"".join(self._pieces)[: min(_HEAD_BYTES, self._max_bytes)]]


class StreamConnection(AsyncStreamingClient):  # type: ignore[misc]
    """tweepy's streaming client for one connection: no second try, raw bytes out, every end a `StreamError`.

    tweepy's own loop reconnects without a pause after a clean end and stops for good on one bad line.
    """

    def __init__(
        self,
        api: XApi,
        token: str,
        inbox: Inbox,
        options: StreamOptions,
        *,
        opened: Callable[[], None] = lambda: None,
        span: Mapping[str, str] | None = None,
    ) -> None:
        """`opened` hears when X has begun to send. `span` is what X is asked to send again: `backfill_minutes`, or
        `start_time` and `end_time`; with an end the connection waits for room in `inbox` instead of giving up.
        """
        super().__init__(token, return_type=dict)
        self._opened = opened
        self._gate = api.gate
        self._base_url = api.base_url
        self._inbox = inbox
        self._options = options
        self._span = dict(span or {})
        self.status: int | None = None
        """HTTP status of the answer, None before there is one."""
        self.heard_at = datetime.now(UTC)
        """When the last byte came."""
        self.headers: Mapping[str, str] = {}

    async def _connect(self, method: str, endpoint: str, params: Any = None, **_: Any) -> None:
        url = f"{self._base_url}{self._options.path}"
        headers = {"Authorization": f"Bearer {self.bearer_token}", "User-Agent": self.user_agent}
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._options.connect_timeout_s, sock_read=self._options.stall_s
        )
        asked = {**(params or {}), **self._options.parameters, **self._span}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(method, url, params=asked, headers=headers) as response,
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
        await self._inbox.put(Connected(_began_at(response.headers), "backfill_minutes" in self._span))
        splitter = LineSplitter(self._options.max_line_bytes)
        async for chunk in response.content.iter_any():
            self.heard_at = datetime.now(UTC)
            for line in splitter.feed(chunk):
                if line:
                    await self.on_data(line)
            if splitter.cut:
                _log.error("stream.line_cut", lines=splitter.cut, limit_bytes=self._options.max_line_bytes)
                splitter.cut = 0
        raise StreamError("the X API closed the stream", cause="closed")

    async def on_connect(self) -> None:
        """Tell the owner, once the X API has begun to send."""
        self._opened()
        _log.info("stream.connected", base_url=self._base_url)

    async def on_data(self, raw_data: bytes) -> None:
        """Queue the line; with the queue full, give the connection up rather than slow the reader down."""
        if b'"data"' in raw_data:
            self._gate.count(1)
        if "end_time" in self._span:
            await self._inbox.put(raw_data)
            return
        try:
            self._inbox.put_nowait(raw_data)
        except asyncio.QueueFull:
            raise StreamError("posts come faster than they can be stored", cause="overflow") from None


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
