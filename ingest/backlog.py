"""What was received and cannot be stored now, kept on disk in the order in which it came."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from ingest.connection import Connected, Disconnected, StreamEvent
from overtone import metrics
from overtone.logging import get_logger
from overtone.spool import Chunk, Position, Record, Spool

_LINE, _CONNECTED, _DISCONNECTED = 0, 1, 2
_BACKFILLED = " backfilled"
DAMAGED = "spool_damaged"
"""Cause of the gap that stands for what could not be read."""

_log = get_logger()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """The oldest events, and what to forget once they are stored."""

    events: Sequence[StreamEvent]
    end: Position
    is_damaged: bool
    """Something was here that cannot be read any more."""


class Backlog:
    """Stream events in `spool`. Its calls finish what they began even when they are cancelled."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._measure()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return self._spool.is_empty

    @property
    def size_bytes(self) -> int:
        """Bytes that wait."""
        return self._spool.size_bytes

    async def put(self, events: Sequence[StreamEvent]) -> int:
        """Keep as many of `events` as there is room for, and return how many. A disk that refuses has no room."""
        try:
            kept = await _finished(lambda: self._spool.append([_record(event) for event in events]))
        except OSError as error:
            _log.error("spool.not_written", reason=error.strerror or type(error).__name__)
            return 0
        metrics.SPOOLED.labels("kept").inc(kept)
        self._measure()
        return kept

    async def peek(self, limit: int) -> Batch:
        """The oldest events, at most `limit`; the same again until they are dropped."""
        chunk: Chunk = await _finished(lambda: self._spool.read(limit))
        return Batch([_event(record) for record in chunk.records], chunk.end, chunk.damaged_bytes > 0)

    async def drop(self, batch: Batch, count: int) -> None:
        """Forget the first `count` events of `batch`; with all of them, also what could not be read after them."""
        if batch.events and not count:
            return
        end = batch.end if count == len(batch.events) else (await self.peek(count)).end
        await _finished(lambda: self._spool.commit(end))
        metrics.SPOOLED.labels("replayed").inc(count)
        self._measure()

    def close(self) -> None:
        """Let another process have what waits."""
        self._spool.close()

    def _measure(self) -> None:
        metrics.SPOOL_BYTES.set(self._spool.size_bytes)


def _record(event: StreamEvent) -> Record:
    if isinstance(event, bytes):
        return Record(_LINE, event)
    if isinstance(event, Connected):
        return Record(_CONNECTED, f"{event.at.isoformat()}{_BACKFILLED if event.is_backfilled else ''}".encode())
    return Record(_DISCONNECTED, event.cause.encode())


def _event(record: Record) -> StreamEvent:
    if record.kind == _CONNECTED:
        at = record.payload.decode()
        return Connected(datetime.fromisoformat(at.removesuffix(_BACKFILLED)), at.endswith(_BACKFILLED))
    if record.kind == _DISCONNECTED:
        return Disconnected(record.payload.decode())
    return record.payload


async def _finished(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread that is waited for whatever happens: nobody else may have the file."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
