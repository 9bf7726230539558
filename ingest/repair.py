"""What was missed while nobody was connected: written down before anything later is stored, then fetched by search.

The ledger of gaps in the database is the only memory. A gap is opened with the newest stored post as its lower bound
and, once the stream is back, gets the moment of connecting as its upper bound, all before the first post of the new
connection is stored: from then on that post would hide how far the stream had come. Whoever starts next finds the
gaps that are not repaired and goes on with them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from ingest.api import XApi, search_queries
from ingest.options import RepairOptions, RuleOption
from ingest.parse import messages_of_search, post_of
from overtone import metrics
from overtone.db.database import Database
from overtone.db.posts import Gap, close_gap, cursor, list_gaps, open_gap
from overtone.errors import DatabaseUnavailableError, OvertoneError, StreamError
from overtone.logging import get_logger
from overtone.schema import Post, datetime_to_snowflake, snowflake_to_datetime

_SEARCHABLE = timedelta(days=7) - timedelta(minutes=2)
_MARGIN = timedelta(seconds=1)
_MAX_GAPS = 10_000
_FIRST_START = "first_start"
"""Cause of what the very first start fetches: nobody was there who could have missed it."""
_FIRST_WAIT_S = 0.25
_MAX_WAIT_S = 60.0

_log = get_logger()

GapState = Literal["open", "closed", "repaired", "unrepairable"]
StorePosts = Callable[[Sequence[Post]], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Span:
    """What to search for: since_id < id < until_id."""

    since_id: int
    until_id: int


@dataclass(slots=True)
class RepairStatus:
    """Figures for people."""

    open_gaps: int = 0
    repaired_posts: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """The gaps of one stream, as its leader with this epoch may write them."""

    db: Database
    stream: str
    epoch: int

    async def reached(self) -> int:
        """The newest stored post of the stream, 0 for none."""
        found = await cursor(self.db, self.stream)
        return found.post_id if found else 0

    async def gaps(self, state: GapState) -> list[Gap]:
        """The gaps in this state, oldest first."""
        listed = await list_gaps(self.db, self.stream, limit=_MAX_GAPS)
        return sorted((gap for gap in listed if gap.state == state), key=lambda gap: gap.gap_id)

    async def open(self, cause: str, started_at: datetime | None, after_post_id: int | None) -> int:
        """A new gap."""
        return await open_gap(
            self.db, self.stream, cause, started_at=started_at, after_post_id=after_post_id, epoch=self.epoch
        )

    async def bound(self, gap_id: int, before_post_id: int) -> None:
        """The gap ended; it waits for repair."""
        await close_gap(self.db, gap_id, before_post_id=before_post_id, epoch=self.epoch)

    async def settle(self, gap_id: int, state: Literal["repaired", "unrepairable"], posts: int) -> None:
        """What became of the gap."""
        await close_gap(self.db, gap_id, state=state, repaired_posts=posts, epoch=self.epoch)


class Repairer:
    """Keeps the gaps in `ledger` and repairs them, one after another, beside the live stream."""

    def __init__(
        self,
        ledger: Ledger,
        api: XApi,
        *,
        rules: Sequence[RuleOption],
        fields: Mapping[str, Sequence[str]],
        options: RepairOptions,
        store: StorePosts,
    ) -> None:
        self.status = RepairStatus()
        self._ledger = ledger
        self._api = api
        self._queries = search_queries(rules)
        self._fields = {name: list(values) for name, values in fields.items() if values}
        self._options = options
        self._store = store
        self._is_due = asyncio.Event()

    async def note_disconnected(self, cause: str) -> None:
        """Write down that posts may be missing from here on.

        Raises:
            DatabaseUnavailableError: try again.
        """
        await self._open(cause)

    async def note_connected(self, at: datetime) -> None:
        """Write down that the stream is back since `at`, and have the gap before it repaired.

        Raises:
            DatabaseUnavailableError: try again.
        """
        await self._bound(at)
        self._is_due.set()

    async def run(self) -> None:
        """Repair gaps as they come, and at once those that an earlier process left; until cancelled."""
        wait_s = _FIRST_WAIT_S
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            try:
                for group in overlapping(await self._waiting_gaps()):
                    await self._repair(group)
                wait_s, self.status.last_error = _FIRST_WAIT_S, None
            except (StreamError, DatabaseUnavailableError) as error:
                if not error.retryable:
                    raise
                self._note(error)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, _MAX_WAIT_S)
                self._is_due.set()

    async def _open(self, cause: str) -> int:
        after = await self._ledger.reached()
        return await self._ledger.open(cause, snowflake_to_datetime(after) if after else None, after or None)

    async def _bound(self, at: datetime) -> None:
        ids: list[int | None] = [gap.gap_id for gap in await self._ledger.gaps("open")]
        before = datetime_to_snowflake(at + _MARGIN)
        for gap_id in ids or [await self._open_at_start(at)]:
            if gap_id is not None:
                await self._ledger.bound(gap_id, before)

    async def _open_at_start(self, at: datetime) -> int | None:
        """The gap between an earlier process and this one, or what the very first start fetches."""
        if await self._ledger.reached():
            return await self._open("restart")
        if not self._options.first_start_back_s:
            return None
        since = at - timedelta(seconds=self._options.first_start_back_s)
        return await self._ledger.open(_FIRST_START, since, datetime_to_snowflake(since))

    async def _waiting_gaps(self) -> list[Gap]:
        waiting = await self._ledger.gaps("closed")
        self.status.open_gaps = len(waiting)
        return waiting

    async def _repair(self, gaps: Sequence[Gap]) -> None:
        """Fetch what the overlapping `gaps` lack and mark them."""
        now = datetime.now(UTC)
        before = max(gap.before_post_id or datetime_to_snowflake(now) for gap in gaps)
        after = min(gap.after_post_id or before for gap in gaps)
        oldest = datetime_to_snowflake(now - _SEARCHABLE)
        since = max(after - _ids(self._options.overlap_s), oldest)
        is_whole, repaired = after >= oldest, 0
        if not self._options.enabled or not self._queries:
            is_whole = False
        elif since < before:
            try:
                repaired = await self._fetch(since, before)
            except StreamError as error:
                if error.details.get("status") != 400:
                    raise
                self._note(error)
                is_whole = False
        state: Literal["repaired", "unrepairable"] = "repaired" if is_whole else "unrepairable"
        for gap in gaps:
            await self._ledger.settle(gap.gap_id, state, repaired if gap is gaps[0] else 0)
            if gap.cause != _FIRST_START:
                metrics.GAP_SECONDS.labels(state).inc(_length_s(gap))
        self.status.open_gaps -= len(gaps)
        self.status.repaired_posts += repaired
        _log.info("gap.closed", gaps=[gap.gap_id for gap in gaps], cause=gaps[0].cause, state=state, posts=repaired)

    async def _fetch(self, since: int, before: int) -> int:
        """Search at once, and the end of the span again when X has had time to index it; return the new posts."""
        started = datetime.now(UTC)
        new = await self._search(Span(since, min(before, datetime_to_snowflake(started))))
        settles_at = snowflake_to_datetime(before) + timedelta(seconds=self._options.settle_s)
        if started < settles_at:
            await asyncio.sleep(max((settles_at - datetime.now(UTC)).total_seconds(), 0.0))
            settled_until = datetime_to_snowflake(started) - _ids(self._options.settle_s)
            new += await self._search(Span(max(since, settled_until), before))
        return new

    async def _search(self, span: Span) -> int:
        return sum([await self._search_one(query, tag, span) for query, tag in self._queries])

    async def _search_one(self, query: str, tag: str | None, span: Span) -> int:
        """Store what `query` finds in `span` and return how many posts were new. A failed page is asked for again."""
        new, token, wait_s = 0, None, _FIRST_WAIT_S
        while True:
            try:
                answer = await self._api.search_recent(
                    query, since_id=span.since_id, until_id=span.until_id, next_token=token, fields=self._fields
                )
            except StreamError as error:
                if not error.retryable or error.details.get("status") == 400:
                    raise
                self._note(error)
                await asyncio.sleep(max(wait_s, float(error.details.get("retry_after_s") or 0.0)))
                wait_s = min(wait_s * 2, _MAX_WAIT_S)
                continue
            posts = _posts_of(answer, tag)
            metrics.POSTS_RECEIVED.labels("search").inc(len(posts))
            new += await self._store(posts)
            token, wait_s = (answer.get("meta") or {}).get("next_token"), _FIRST_WAIT_S
            if not token:
                return new

    def _note(self, error: OvertoneError) -> None:
        if error.message != self.status.last_error:
            _log.warning("repair.delayed", code=error.code, reason=error.message)
        self.status.last_error = error.message


def overlapping(gaps: Sequence[Gap]) -> list[list[Gap]]:
    """`gaps` in groups whose spans touch, so that each group takes one search; oldest first."""
    groups: list[list[Gap]] = []
    reached = 0
    for gap in sorted(gaps, key=lambda gap: gap.after_post_id or gap.before_post_id or 0):
        first = gap.after_post_id or gap.before_post_id or 0
        if groups and first <= reached:
            groups[-1].append(gap)
        else:
            groups.append([gap])
        reached = max(reached, gap.before_post_id or first)
    return groups


def _posts_of(answer: Mapping[str, object], tag: str | None) -> list[Post]:
    posts: list[Post] = []
    for message in messages_of_search(dict(answer)):
        if tag is not None:
            message["matching_rules"] = [{"tag": tag}]
        post = post_of(message)
        if isinstance(post, Post):
            posts.append(post)
    return posts


def _length_s(gap: Gap) -> float:
    end = snowflake_to_datetime(gap.before_post_id) if gap.before_post_id else gap.ended_at or gap.started_at
    return max((end - gap.started_at).total_seconds(), 0.0)


def _ids(seconds: float) -> int:
    """How much ids grow in `seconds`."""
    return int(seconds * 1000) << 22
