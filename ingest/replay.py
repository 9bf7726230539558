"""What a stream published in a span of time, asked for again over a connection of its own (Enterprise)."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from ingest.api import XApi
from ingest.connection import Inbox, StreamConnection
from ingest.connects import Connects
from ingest.options import StreamOptions
from overtone.errors import StreamError

REACH = timedelta(hours=24) - timedelta(minutes=2)
"""How far back X replays."""

_QUEUE_LINES = 2_000
_BATCH_LINES = 500


class Replay:
    """Replays of one stream, which count against the same allowance of connections as the live one."""

    def __init__(
        self, api: XApi, token: str, *, fields: Mapping[str, Sequence[str]], options: StreamOptions, connects: Connects
    ) -> None:
        self._api = api
        self._token = token
        self._fields = fields
        self._options = options
        self._connects = connects

    def use_token(self, token: str) -> None:
        """Connect with `token` from the next time on."""
        self._token = token

    async def open(self, since: datetime, until: datetime) -> "ReplayLines":
        """Connect once that is allowed; the lines of the posts published from `since` to `until`."""
        await self._api.gate.until_open()
        await self._connects.until_allowed()
        number = await self._connects.take()
        inbox: Inbox = asyncio.Queue(_QUEUE_LINES)
        span = {"start_time": _shown(since), "end_time": _shown(until + timedelta(seconds=1))}
        connection = StreamConnection(self._api, self._token, inbox, self._options, span=span)
        return ReplayLines(connection, connection.filter(**self._fields), inbox, self._connects, number)


class ReplayLines:
    """An async iterator of batches of lines; it ends when X has sent all, and raises `StreamError` if it did not."""

    def __init__(
        self,
        connection: StreamConnection,
        reading: "asyncio.Task[None]",
        inbox: Inbox,
        connects: Connects,
        number: int | None,
    ) -> None:
        self._connection = connection
        self._reading = reading
        self._inbox = inbox
        self._connects = connects
        self._number = number
        self._is_closed = False

    def __aiter__(self) -> "ReplayLines":
        return self

    async def __anext__(self) -> list[bytes]:
        first = asyncio.create_task(self._inbox.get())
        try:
            await asyncio.wait({first, self._reading}, return_when=asyncio.FIRST_COMPLETED)
            events = [first.result()] if first.done() else []
        finally:
            first.cancel()
        while len(events) < _BATCH_LINES and not self._inbox.empty():
            events.append(self._inbox.get_nowait())
        if events:
            return [event for event in events if isinstance(event, bytes)]
        await self.close()
        self._judge()
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the connection, if X has not."""
        if self._is_closed:
            return
        self._is_closed = True
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        if self._connection.status is None:
            await self._connects.give_back(self._number)
        else:
            self._connects.learn(self._connection.headers)

    def _judge(self) -> None:
        error = None if self._reading.cancelled() else self._reading.exception()
        # A replay that is whole ends as a stream that is closed does.
        if isinstance(error, StreamError) and (self._connection.status != 200 or error.details["cause"] != "closed"):
            raise error
        if error is not None and not isinstance(error, StreamError):
            raise StreamError(f"reading a replay failed: {type(error).__name__}", cause="failed") from error


def _shown(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
