"""One connection to the simulator's stream: posts in their order, and the faults that are due on it."""

import asyncio
import contextlib
import json
import random
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from ingest.simulator.answers import ERROR_LINE, OPERATIONAL_DISCONNECT
from ingest.simulator.faults import Fault
from ingest.simulator.ledger import STREAMED, Ledger
from ingest.timeline import Timeline, to_line

_MAX_BEHIND_POSTS = 200_000
_MAX_CHUNK_POSTS = 200
_SLOW_BYTES = 40
_SLOW_PAUSE_S = 0.02
_LONGEST_HOLD_S = 1.0

ON_CONNECTION = frozenset({"close", "reset", "disconnect", "stall", "slow", "garbage", "error_line", "duplicate"})
"""Faults that a connection does as soon as they are ordered; without a connection nothing happens."""

ON_POSTS = frozenset({"giant_line", "missing_tag", "unknown_fields", "partial_error", "split_utf8", "out_of_order"})
"""Faults of so many of the next posts, whichever connection they are sent on."""


@dataclass(slots=True)
class Source:
    """What all connections send from."""

    timeline: Timeline
    ledger: Ledger
    rng: random.Random
    keep_alive_s: float
    message: Callable[[web.Request, int], dict[str, Any] | None]
    """The message of the post at a position; None where it is not sent to this client."""
    may_send: Callable[[], bool]
    """Whether the usage cap leaves room."""
    on_posts: Counter[str] = field(default_factory=Counter)
    """For how many posts each fault of `ON_POSTS` is still due."""


class Feed:
    """A connection, from its first byte to its last."""

    def __init__(
        self,
        source: Source,
        request: web.Request,
        response: web.StreamResponse,
        start: int,
        end: int | None = None,
        *,
        partition: int = 0,
    ) -> None:
        """Sends from the position `start` on; with `end` the connection is over there, as a replay is."""
        self.partition = partition
        self.feed_id = str(uuid.uuid4())
        self.connected_at = datetime.now(UTC)
        self.wake = asyncio.Event()
        self.commands: deque[Fault] = deque()
        self.is_over = False
        self._source = source
        self._request = request
        self._response = response
        self._position = start
        self._end = end
        self._packer: Any = None
        self._slow_until = 0.0
        self._wrote_at = asyncio.get_running_loop().time()

    @property
    def is_replay(self) -> bool:
        """Whether it ends by itself."""
        return self._end is not None

    async def run(self, *, packs: bool) -> None:
        """Send until the connection is over. With `packs` the bytes are gzip."""
        if packs:
            self._packer = zlib.compressobj(wbits=31)
        while not self.is_over:
            self.wake.clear()
            if self.commands:
                await self._obey(self.commands.popleft())
            elif self._end is not None and self._position >= self._end:
                self.is_over = True
            elif self._keep_alive_in_s() <= 0:
                # Posts that are not for this client come meanwhile, or none do.
                await self._write(b"\r\n")
            elif self._position < self._source.timeline.end:
                await self._send_posts()
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), self._keep_alive_in_s())
        if self._packer is not None and not self._was_reset:
            await self._response.write(self._packer.flush())

    def _keep_alive_in_s(self) -> float:
        return self._wrote_at + self._source.keep_alive_s - asyncio.get_running_loop().time()

    @property
    def _was_reset(self) -> bool:
        return self._request.transport is None or self._request.transport.is_closing()

    async def _send_posts(self) -> None:
        source = self._source
        is_far_behind = self._end is None and source.timeline.end - self._position > _MAX_BEHIND_POSTS
        if is_far_behind or not source.may_send():
            self.commands.append(Fault(kind="disconnect"))
            return
        shuffled = await self._hold(source.on_posts["out_of_order"])
        end = source.timeline.end if self._end is None else min(source.timeline.end, self._end)
        first = max(self._position, source.timeline.start)
        positions = list(range(first, min(end, first + max(_MAX_CHUNK_POSTS, shuffled))))
        if shuffled:
            head = positions[:shuffled]
            source.rng.shuffle(head)
            positions[:shuffled] = head
            source.on_posts["out_of_order"] = 0
        await self._send(positions)
        self._position = first + len(positions)

    async def _hold(self, wanted: int) -> int:
        """Wait until `wanted` posts can be shuffled, or a second is over; return how many there are."""
        deadline = asyncio.get_running_loop().time() + _LONGEST_HOLD_S
        while wanted and self._source.timeline.end - self._position < wanted:
            if asyncio.get_running_loop().time() > deadline or self.commands:
                break
            await asyncio.sleep(0.02)
        return min(wanted, self._source.timeline.end - self._position)

    async def _send(self, positions: Sequence[int]) -> None:
        is_split = self._source.on_posts["split_utf8"] > 0
        lines: list[bytes] = []
        for position in positions:
            message = self._source.message(self._request, position)
            if message is not None:
                lines.append(self._line(message))
                self._source.ledger.streamed += 1
                self._source.ledger.mark(position, STREAMED)
        if is_split:
            for piece in _cut_in_characters(b"".join(lines)):
                await self._write(piece)
        elif lines:
            await self._write(b"".join(lines))

    def _line(self, message: dict[str, Any]) -> bytes:
        due = self._source.on_posts
        if self._takes("missing_tag"):
            message["matching_rules"] = [{"id": rule["id"]} for rule in message["matching_rules"]]
        if self._takes("unknown_fields"):
            message["data"]["novelty"] = {"since": "tomorrow", "list": [1, None, {"deep": True}]}
            message["surprise"] = "a field that nobody documents"
        if self._takes("partial_error"):
            message |= ERROR_LINE
        if due["giant_line"]:
            message["padding"] = "x" * max(due["giant_line"] - len(to_line(message)), 0)
            due["giant_line"] = 0
        if self._takes("split_utf8"):
            # Half a surrogate pair cannot be written in UTF-8: such a text stays escaped.
            try:
                return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\r\n"
            except UnicodeEncodeError:
                return to_line(message)
        return to_line(message)

    def _takes(self, kind: str) -> bool:
        due = self._source.on_posts
        if due[kind] <= 0:
            return False
        due[kind] -= 1
        return True

    async def _obey(self, fault: Fault) -> None:
        loop = asyncio.get_running_loop()
        if fault.kind == "garbage":
            await self._write(b'{"data": {"id": oops\r\n' * int(fault.size))
        elif fault.kind == "error_line":
            await self._write(to_line(ERROR_LINE) * int(fault.size))
        elif fault.kind == "duplicate":
            first = max(self._position - int(fault.size), self._source.timeline.start)
            await self._send(range(first, self._position))
        elif fault.kind == "stall":
            await asyncio.sleep(fault.size)
        elif fault.kind == "slow":
            self._slow_until = loop.time() + fault.size
        else:
            self.is_over = True
        if fault.kind == "disconnect":
            await self._write(to_line(OPERATIONAL_DISCONNECT))
        elif fault.kind == "reset" and self._request.transport is not None:
            self._request.transport.abort()

    async def _write(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data and loop.time() < self._slow_until and not self.commands:
            await self._put(data[:_SLOW_BYTES])
            data = data[_SLOW_BYTES:]
            await asyncio.sleep(_SLOW_PAUSE_S)
        if data:
            await self._put(data)

    async def _put(self, data: bytes) -> None:
        self._wrote_at = asyncio.get_running_loop().time()
        if self._packer is not None:
            data = self._packer.compress(data) + self._packer.flush(zlib.Z_SYNC_FLUSH)
        await self._response.write(data)


def _cut_in_characters(data: bytes) -> Iterator[bytes]:
    """`data` in pieces that end inside a character, wherever there is one of several bytes."""
    start = 0
    for index in range(1, len(data)):
        # A byte that goes on with a character whose first byte is the one before it.
        if data[index] & 0xC0 == 0x80 and data[index - 1] & 0xC0 == 0xC0:
            yield data[start:index]
            start = index
    yield data[start:]
