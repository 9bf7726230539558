"""From received lines to stored posts, in their order: directly, or by way of the disk while the database is away."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ingest.backlog import DAMAGED, Backlog
from ingest.connection import Connected, Disconnected, Inbox, StreamEvent
from ingest.options import WriteOptions
from ingest.parse import Bad, StreamProblem, parse_line
from ingest.repair import Repairer
from ingest.store import PostStore
from ingest.waiting import until_true
from overtone import metrics
from overtone.errors import DatabaseUnavailableError
from overtone.logging import get_logger
from overtone.schema import Post

_FIRST_WAIT_S = 0.1
_MAX_WAIT_S = 1.0
_PARSED_AT_ONCE = 16
"""Lines: a tenth of a millisecond in which the loop does nothing else."""

_log = get_logger()


@dataclass(slots=True)
class Step:
    """Events that are stored as one: a mark, or lines."""

    events: int = 0
    mark: Connected | Disconnected | None = None
    posts: list[Post] = field(default_factory=list)
    others: list[Bad | StreamProblem] = field(default_factory=list)


class Writer:
    """Takes events from the inbox by the batch and stores what they hold.

    What the database does not take goes to the backlog, and so does all that comes after it until the backlog is
    stored: the marks of connections mean something only in their place among the lines. With no room on the disk
    the newest batch waits in memory, then the inbox fills, then the stream is left.
    """

    def __init__(
        self,
        inbox: Inbox,
        backlog: Backlog,
        store: PostStore,
        repairer: Repairer,
        *,
        stream: str,
        options: WriteOptions,
    ) -> None:
        self._inbox = inbox
        self._backlog = backlog
        self._store = store
        self._repairer = repairer
        self._stream = stream
        self._options = options
        self._is_draining = False
        self._held: Sequence[StreamEvent] = ()
        """Taken from the inbox, and neither stored nor on disk yet; newer than all that is on disk."""
        self._held_moves = asyncio.Lock()
        self._may_be_stored = not backlog.is_empty
        """Whether the next posts may have been stored by an attempt of which no answer came."""

    @property
    def is_idle(self) -> bool:
        """Whether all that was received is stored."""
        return not self._held and self._inbox.empty() and self._backlog.is_empty

    async def run(self) -> None:
        """Write until cancelled.

        Raises:
            FencedError: a later process has taken over.
        """
        while True:
            if self._held or not self._backlog.is_empty:
                await self._catch_up()
            else:
                await self._take()
                await self._store_held()

    async def finish(self) -> None:
        """Return when everything that was received is stored; from here on nothing waits for a batch to fill."""
        self._is_draining = True
        await until_true(lambda: self.is_idle)

    async def _take(self) -> None:
        """Wait for an event, and a little longer for more."""
        self._held = [await self._inbox.get()]
        room = self._options.batch_rows - 1
        if self._inbox.qsize() < room and not self._is_draining:
            await asyncio.sleep(self._options.flush_s)
        self._held = [*self._held, *self._waiting(room)]

    def _waiting(self, room: int) -> list[StreamEvent]:
        return [self._inbox.get_nowait() for _ in range(min(room, self._inbox.qsize()))]

    async def _store_held(self) -> None:
        """Store what is held, and then what came meanwhile for as long as that fills batches.

        A batch is parsed while the database is at work on the one before it.
        """
        rows, ready = self._options.batch_rows, await _parsed(self._held)
        while ready:
            size = len(self._held)
            storing = asyncio.create_task(self._stored(ready))
            try:
                more = self._waiting(rows) if self._inbox.qsize() >= rows else []
                self._held = [*self._held, *more]
                ready = await _parsed(more)
                done = await storing
            finally:
                storing.cancel()
            self._held = self._held[done:]
            if done < size:
                return

    async def _catch_up(self) -> None:
        """Store the backlog, while what comes in joins it."""
        self._held = self._held[await self._backlog.put(self._held) :]
        mover = asyncio.create_task(self._move())
        wait_s = _FIRST_WAIT_S
        try:
            while (self._held or not self._backlog.is_empty) and not mover.done():
                if await self._store_next():
                    wait_s = _FIRST_WAIT_S
                else:
                    await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
                    wait_s = min(wait_s * 2, _MAX_WAIT_S)
            if mover.done():
                mover.result()
        finally:
            mover.cancel()
            await asyncio.gather(mover, return_exceptions=True)

    async def _move(self) -> None:
        while True:
            if not self._held:
                # No await lies between taking and holding: whoever ends this task loses nothing.
                self._held = [await self._inbox.get(), *self._waiting(self._options.batch_rows - 1)]
            async with self._held_moves:
                kept = await self._backlog.put(self._held)
                self._held = self._held[kept:]
            metrics.INGEST_QUEUE.set(self._inbox.qsize())
            await asyncio.sleep(self._options.flush_s if self._inbox.qsize() < self._options.batch_rows else 0)

    async def _store_next(self) -> bool:
        """Try to store the oldest events; whether that went well."""
        async with self._held_moves:
            if self._backlog.is_empty:
                self._held = self._held[await self._stored(await _parsed(self._held)) :]
                return not self._held
        batch = await self._backlog.peek(self._options.batch_rows)
        if batch.is_damaged and not batch.events:
            marks: Sequence[StreamEvent] = (Disconnected(DAMAGED), Connected(datetime.now(UTC)))
            if await self._stored(await _parsed(marks)) < len(marks):
                return False
            _log.error("spool.damaged", advice="what could not be read is fetched by search")
        done = await self._stored(await _parsed(batch.events))
        await self._backlog.drop(batch, done)
        return done == len(batch.events)

    async def _stored(self, steps: Sequence[Step]) -> int:
        """Store `steps` in their order, and return how many of their events the database took."""
        metrics.INGEST_QUEUE.set(self._inbox.qsize())
        done = 0
        for step in steps:
            try:
                await self._store_step(step)
            except DatabaseUnavailableError as error:
                self._store.note(error)
                self._may_be_stored = True
                break
            self._may_be_stored = False
            done += step.events
        return done

    async def _store_step(self, step: Step) -> None:
        if isinstance(step.mark, Connected):
            await self._repairer.note_connected(step.mark.at, is_backfilled=step.mark.is_backfilled)
        elif isinstance(step.mark, Disconnected):
            await self._repairer.note_disconnected(step.mark.cause)
        if step.posts:
            await self._store.store_once(step.posts, stream=self._stream, is_repeat=self._may_be_stored)
            self._repairer.note_stored(step.posts)
            self._count(step.posts)
        for one in step.others:
            if isinstance(one, StreamProblem):
                _log.warning("stream.problem_received", kind=one.kind, title=one.title)
            else:
                await self._store.put_aside(one)

    def _count(self, posts: Sequence[Post]) -> None:
        metrics.POSTS_RECEIVED.labels("stream").inc(len(posts))
        for tag, count in Counter(tag for post in posts for tag in post.rule_tags).items():
            metrics.RULE_POSTS.labels(tag).inc(count)
        self._store.status.posts_received += len(posts)
        newest = max(post.created_at for post in posts)
        lag_s = max((datetime.now(UTC) - newest).total_seconds(), 0.0)
        self._store.status.lag_s = lag_s
        metrics.STREAM_LAG_SECONDS.set(lag_s)


async def _parsed(events: Sequence[StreamEvent]) -> list[Step]:
    """`steps` of `events`, with pauses in which the rest of the process goes on."""
    made: list[Step] = []
    for start in range(0, len(events), _PARSED_AT_ONCE):
        steps(events[start : start + _PARSED_AT_ONCE], made)
        await asyncio.sleep(0)
    return made


def steps(events: Sequence[StreamEvent], made: list[Step]) -> None:
    """Add `events` to `made`: runs of lines in one step, and each mark in a step of its own."""
    for event in events:
        if not isinstance(event, bytes):
            made.append(Step(1, mark=event))
            continue
        if not made or made[-1].mark is not None:
            made.append(Step())
        step, parsed = made[-1], parse_line(event)
        step.events += 1
        if isinstance(parsed, Post):
            step.posts.append(parsed)
        elif isinstance(parsed, Bad | StreamProblem):
            step.others.append(parsed)
