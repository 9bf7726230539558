"""Storing posts, and handing what is new to the classifier."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ingest.classify import Classifier
from ingest.parse import Bad
from ingest.waiting import until_it_works
from overtone import metrics
from overtone.db.database import Database
from overtone.db.gaps import Means
from overtone.db.posts import write_dead_letter, write_posts
from overtone.errors import OvertoneError
from overtone.logging import get_logger
from overtone.schema import Post

MAX_DEAD_LETTER_BYTES = 65_536

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
    """Writes posts of one source; with an `epoch`, only as long as no later leader of the stream has come."""

    def __init__(self, db: Database, classifier: Classifier, *, epoch: int | None) -> None:
        self.status = StoreStatus()
        self._db = db
        self._classifier = classifier
        self._epoch = epoch

    async def store(self, posts: Sequence[Post], *, stream: str) -> int:
        """The same as `store_once`, waiting for the database as long as it takes.

        Raises:
            FencedError: a later process has taken over.
        """
        is_repeat = False

        def note(error: OvertoneError) -> None:
            nonlocal is_repeat
            is_repeat = True
            self.note(error)

        return await until_it_works(lambda: self.store_once(posts, stream=stream, is_repeat=is_repeat), note)

    async def store_once(self, posts: Sequence[Post], *, stream: str, is_repeat: bool = False) -> int:
        """Store `posts` as coming from `stream`, have the new ones classified, and return how many were new.

        `is_repeat` says that they may be stored already.

        Raises:
            FencedError: a later process has taken over.
            DatabaseUnavailableError: try again.
        """
        if not posts:
            return 0
        began = time.monotonic()
        new = await write_posts(self._db, posts, stream=stream, epoch=self._epoch)
        if self.status.last_error is not None:
            _log.info("store.resumed")
        self.status.last_error = None
        metrics.WRITE_SECONDS.labels("posts").observe(time.monotonic() - began)
        metrics.POSTS_STORED.inc(new)
        self.status.posts_stored += new
        if not is_repeat and new == len({post.post_id for post in posts}):
            self._classifier.offer(posts)
        elif is_repeat or new:
            # Which of them were new is not known: the database knows which of them lack a prediction.
            self._classifier.scan_soon(min(post.post_id for post in posts))
        return new

    async def put_aside(self, bad: Bad) -> None:
        """Keep a line that holds no post.

        Raises:
            DatabaseUnavailableError: try again.
        """
        await write_dead_letter(self._db, bad.raw[:MAX_DEAD_LETTER_BYTES], bad.reason)
        metrics.DEAD_LETTERS.labels(bad.reason).inc()
        self.status.dead_letters += 1
        _log.warning("line.put_aside", reason=bad.reason, size_bytes=len(bad.raw))

    def note(self, error: OvertoneError) -> None:
        """Remember why something waits."""
        if error.message != self.status.last_error:
            _log.warning("store.delayed", code=error.code, reason=error.message)
        self.status.last_error = error.message


class FoundStore:
    """Posts that the stream `source` missed and that were found by other means: stored under its name and theirs."""

    def __init__(self, store: PostStore, source: str) -> None:
        self._store = store
        self._source = source

    async def store(self, posts: Sequence[Post], *, means: Means) -> int:
        """See `PostStore.store`."""
        return await self._store.store(posts, stream=f"{self._source}_{means}")

    async def put_aside(self, bad: Bad) -> None:
        """See `PostStore.put_aside`."""
        await until_it_works(lambda: self._store.put_aside(bad), self._store.note)
