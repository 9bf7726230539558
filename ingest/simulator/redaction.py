"""Which of the simulator's posts are gone, and what is told about it."""

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from ingest.posts import PostSource
from ingest.simulator.compliance import USER_BACK, USER_GONE, EventLog, JobType, post_event, user_event
from ingest.simulator.ledger import GONE, Ledger
from ingest.timeline import Timeline, author_id_of, author_of

_HIDES = frozenset({"delete", "drop"})


class Redactions:
    """Posts and authors that may no longer be kept; every change of it is an event."""

    def __init__(self, timeline: Timeline, ledger: Ledger, source: PostSource, rng: random.Random) -> None:
        self.events = EventLog()
        self._timeline = timeline
        self._ledger = ledger
        self._source = source
        self._rng = rng
        self._authors: dict[int, str] = {}
        self._scrubbed: set[int] = set()

    def order(self, kind: str, count: int, ids: Sequence[int]) -> bool:
        """Do the fault of `kind` to `ids`, or to `count` posts or authors drawn from those there are."""
        is_of_user = kind.startswith("user_") or kind == "scrub_geo"
        if is_of_user:
            authors = [author_of(author_id) for author_id in ids] or self._some_authors(kind, count)
            for author in authors:
                self._redact_author(kind, author)
            return bool(authors)
        found = (self._timeline.position_of(post_id) for post_id in ids)
        positions = [position for position in found if position is not None] or self._some_posts(kind, count)
        for position in positions:
            self._redact_post(kind, position)
        return bool(positions)

    def is_gone(self, position: int) -> bool:
        """Whether the post at `position` may no longer be shown."""
        if self._ledger.has(position, GONE):
            return True
        return bool(self._authors) and self._source.author(position) in self._authors

    def gone(self) -> Iterator[int]:
        """The kept positions of all posts that are gone, ascending."""
        if not self._authors:
            return self._ledger.positions(GONE)
        return (position for position in range(self._timeline.start, self._timeline.end) if self.is_gone(position))

    def verdict(self, type_: JobType, number: int) -> str | None:
        """Why the post or author with this id may not be kept as it is; None where nothing speaks against it."""
        if type_ == "users":
            author = author_of(number)
            return self._authors.get(author) or ("scrub_geo" if author in self._scrubbed else None)
        position = self._timeline.position_of(number)
        if position is None:
            return None
        if self._ledger.has(position, GONE):
            return "deleted"
        author = self._source.author(position)
        return self._authors.get(author) or ("scrub_geo" if author in self._scrubbed else None)

    def _some_posts(self, kind: str, count: int) -> list[int]:
        start, end = self._timeline.start, self._timeline.end
        if kind == "undrop":
            return list(self._ledger.positions(GONE))[:count]
        size = min(count, end - start)
        return [position for position in self._rng.sample(range(start, end), size) if not self.is_gone(position)]

    def _some_authors(self, kind: str, count: int) -> list[int]:
        if kind in USER_BACK:
            return [author for author, why in self._authors.items() if why == USER_BACK[kind]][:count]
        start, end = self._timeline.start, self._timeline.end
        positions = self._rng.sample(range(start, end), min(count, end - start))
        return list(dict.fromkeys(self._source.author(position) for position in positions))

    def _redact_post(self, kind: str, position: int) -> None:
        if kind in _HIDES:
            self._ledger.mark(position, GONE)
        elif kind == "undrop":
            self._ledger.unmark(position, GONE)
        author_id = author_id_of(self._source.author(position))
        self.events.add(post_event(kind, self._timeline.post_id(position), author_id, datetime.now(UTC)))

    def _redact_author(self, kind: str, author: int) -> None:
        newest = self._timeline.post_id(self._timeline.end - 1) if self._timeline.end > self._timeline.start else 0
        if kind in USER_GONE:
            self._authors[author] = USER_GONE[kind]
        elif kind in USER_BACK:
            self._authors.pop(author, None)
        else:
            self._scrubbed.add(author)
        self.events.add(user_event(kind, author_id_of(author), datetime.now(UTC), newest))
