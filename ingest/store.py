"""Storing posts: keeps trying while the database is away, and hands what is new to the classifier."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ingest.classify import Classifier
from ingest.options import WriteOptions
from ingest.parse import Bad, KeepAlive, StreamProblem, parse_line
from ingest.repair import Repairer
from ingest.stream import Connected, Inbox, StreamEvent
from ingest.waiting import until_it_works, until_true
from overtone import metrics
from overtone.db.database import Database
from overtone.db.posts import write_dead_letter, write_posts
from overtone.errors import OvertoneError
from overtone.logging import get_logger
from overtone.schema import Post

_MAX_DEAD_LETTER_BYTES = 65_536

_log = get_logger()


@dataclass(slots=True)
class StoreStatus:
    """Figures for people."""

    posts_received: int = 0
    posts_stored: int = 0
    dead_letters: int = 0
    lag_s: float | None = None
    """Age of the newest post when it was stored."""
    last_error: str | None = None


class PostStore:
    """Writes posts of one source; `epoch` fences off an earlier process that still writes."""

    def __init__(self, db: Database, classifier: Classifier, *, epoch: int) -> None:
        self.status = StoreStatus()
        self._db = db
        self._classifier = classifier
        self._epoch = epoch

    async def store(self, posts: Sequence[Post], *, stream: str) -> int:
        """Store `posts` as coming from `stream`, have the new ones classified, and return how many were new.

        Waits for the database as long as it takes.

        Raises:
            FencedError: a later process has taken over.
        """
        if not posts:
            return 0
        began, failures = time.monotonic(), 0

        def note(error: OvertoneError) -> None:
            nonlocal failures
            failures += 1
            self.note(error)

        epoch = self._epoch
        new = await until_it_works(lambda: write_posts(self._db, posts, stream=stream, epoch=epoch), note)
        if self.status.last_error is not None:
            _log.info("store.resumed")
        self.status.last_error = None
        metrics.WRITE_SECONDS.labels("posts").observe(time.monotonic() - began)
        metrics.POSTS_STORED.inc(new)
        self.status.posts_stored += new
        if failures == 0 and new == len({post.post_id for post in posts}):
            self._classifier.offer(posts)
        elif failures or new:
            # Which of them were new is not known: the database knows which of them lack a prediction.
            self._classifier.scan_soon(min(post.post_id for post in posts))
        return new

    async def put_aside(self, bad: Bad) -> None:
        """Keep a line that holds no post."""
        raw = bad.raw[:_MAX_DEAD_LETTER_BYTES]
        await until_it_works(lambda: write_dead_letter(self._db, raw, bad.reason), self.note)
        metrics.DEAD_LETTERS.labels(bad.reason).inc()
        self.status.dead_letters += 1
        _log.warning("line.put_aside", reason=bad.reason, size_bytes=len(bad.raw))

    def note(self, error: OvertoneError) -> None:
        """Remember why something waits."""
        if error.message != self.status.last_error:
            _log.warning("store.delayed", code=error.code, reason=error.message)
        self.status.last_error = error.message


class Writer:
    """Takes the stream's lines in their order, by the batch, and stores what they hold."""

    def __init__(
        self, inbox: Inbox, store: PostStore, repairer: Repairer, *, stream: str, options: WriteOptions
    ) -> None:
        self._inbox = inbox
        self._store = store
        self._repairer = repairer
        self._stream = stream
        self._options = options
        self._is_draining = False
        self._is_busy = False

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            first = await self._inbox.get()
            self._is_busy = True
            try:
                await self._handle([first, *await self._more()])
            finally:
                self._is_busy = False

    async def finish(self) -> None:
        """Return when everything in the inbox is stored; from here on nothing waits for a batch to fill."""
        self._is_draining = True
        await until_true(lambda: not self._is_busy and self._inbox.empty())

    async def _more(self) -> list[StreamEvent]:
        room = self._options.batch_rows - 1
        if self._inbox.qsize() < room and not self._is_draining:
            await asyncio.sleep(self._options.flush_s)
        return [self._inbox.get_nowait() for _ in range(min(room, self._inbox.qsize()))]

    async def _handle(self, events: Sequence[StreamEvent]) -> None:
        """Store the posts of `events`; what marks the ends of connections is written down in its place among them."""
        metrics.INGEST_QUEUE.set(self._inbox.qsize())
        posts: list[Post] = []
        for event in events:
            if isinstance(event, bytes):
                await self._take_line(event, posts)
                continue
            await self._store_batch(posts)
            posts = []
            if isinstance(event, Connected):
                await self._repairer.note_connected(event.at)
            else:
                await self._repairer.note_disconnected(event.cause)
        await self._store_batch(posts)

    async def _take_line(self, line: bytes, posts: list[Post]) -> None:
        parsed = parse_line(line)
        if isinstance(parsed, Post):
            posts.append(parsed)
        elif isinstance(parsed, StreamProblem):
            _log.warning("stream.problem_received", kind=parsed.kind, title=parsed.title)
        elif not isinstance(parsed, KeepAlive):
            await self._store.put_aside(parsed)

    async def _store_batch(self, posts: Sequence[Post]) -> None:
        if not posts:
            return
        metrics.POSTS_RECEIVED.labels("stream").inc(len(posts))
        self._store.status.posts_received += len(posts)
        await self._store.store(posts, stream=self._stream)
        newest = max(post.created_at for post in posts)
        lag_s = max((datetime.now(UTC) - newest).total_seconds(), 0.0)
        self._store.status.lag_s = lag_s
        metrics.STREAM_LAG_SECONDS.set(lag_s)
