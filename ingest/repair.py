"""What was missed while nobody was connected: written down before anything later is stored, then fetched.

The ledger of gaps in the database is the only memory. A gap is opened with the newest stored post as its lower bound
and, once the stream is back, gets the moment of connecting as its upper bound, all before the first post of the new
connection is stored: from then on that post would hide how far the stream had come. Whoever starts next finds the
gaps that are not repaired and goes on with them.

By what a gap is filled the plan decides. On Enterprise X sends again what a short one lacks with the new connection
(`backfill`), and what one of the last day lacks over a connection of its own (`replay`). All others are searched for.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from ingest.api import XApi, search_queries, search_shortcoming
from ingest.ledger import FIRST_START, Ledger, overlapping
from ingest.options import IngestOptions
from ingest.parse import Bad, StreamProblem, messages_of_search, parse_line, post_of
from ingest.replay import REACH as REPLAYABLE
from ingest.replay import Replay
from overtone import metrics
from overtone.db.gaps import Ending, Gap, Means
from overtone.errors import DatabaseUnavailableError, OvertoneError, StreamError
from overtone.logging import get_logger
from overtone.schema import Post, datetime_to_snowflake, snowflake_to_datetime

_SEARCHABLE = timedelta(days=7) - timedelta(minutes=2)
_MARGIN = timedelta(seconds=1)
_FIRST_WAIT_S = 0.25
_MAX_WAIT_S = 60.0
_BACKFILL_PATIENCE_S = 600.0
"""How long a backfill may take before its gap is filled another way."""
_LOOK_EVERY_S = 0.1
_STALL_MARGIN_S = 2.0

_log = get_logger()


class FoundPosts(Protocol):
    """Where posts go that were missed."""

    async def store(self, posts: Sequence[Post], *, means: Means) -> int:
        """Store them, and return how many were new."""
        ...

    async def put_aside(self, bad: Bad) -> None:
        """Keep a line that holds no post."""
        ...


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


@dataclass(slots=True)
class _Backfill:
    """X sends again what `gap_ids` lack; over when for a while nothing older than the connection has come.

    Posts are compared with each other and with the connection, by X's clock, and waits are measured by ours: the two
    may be many seconds apart.
    """

    gap_ids: frozenset[int]
    connected_at: datetime
    """X's clock."""
    newest: datetime
    """When the newest post was made that was stored since. X's clock."""
    reached: datetime
    """What `newest` was when a post from before the connection was stored last. X's clock."""
    last_older_at: datetime
    """When that was. Our clock."""

    def note_stored(self, created: Sequence[datetime]) -> None:
        """Hear when the posts were made that were stored just now."""
        self.newest = max(self.newest, *created)
        if min(created) < self.connected_at:
            self.reached, self.last_older_at = self.newest, datetime.now(UTC)


class Repairer:
    """Keeps the gaps in `ledger` and repairs them, one after another, beside the live stream."""

    def __init__(
        self,
        ledger: Ledger,
        api: XApi,
        *,
        options: IngestOptions,
        found: FoundPosts,
        replay: Replay | None = None,
        is_idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """`replay` where the plan has it. `is_idle` says whether all that was received is stored."""
        self.status = RepairStatus()
        self._ledger = ledger
        self._api = api
        self._queries = search_queries(options.rules) if options.stream.has_rules else []
        self._shortcoming = search_shortcoming(options.rules) if options.stream.has_rules else "search knows no sample"
        self._fields = options.fields
        self._options = options.repair
        self._stall_s = options.stream.stall_s
        self._found = found
        self._replay = replay
        self._is_idle = is_idle
        self._is_due = asyncio.Event()
        self._backfill: _Backfill | None = None

    async def note_disconnected(self, cause: str) -> None:
        """Write down that posts may be missing from here on.

        Raises:
            DatabaseUnavailableError: try again.
        """
        await self._open(cause)
        # What had not come by then will not come any more.
        self._backfill = None

    async def note_connected(self, at: datetime, *, is_backfilled: bool = False) -> None:
        """Write down that the stream is back since `at`, and have the gap before it repaired.

        Raises:
            DatabaseUnavailableError: try again.
        """
        ids = await self._bound(at)
        self._backfill = None
        if is_backfilled and ids:
            self._backfill = _Backfill(
                frozenset(ids), connected_at=at, newest=at, reached=at, last_older_at=datetime.now(UTC)
            )
        self._is_due.set()

    def note_stored(self, posts: Sequence[Post]) -> None:
        """Hear of posts of the stream that were stored."""
        if self._backfill is not None and posts:
            self._backfill.note_stored([post.created_at for post in posts])

    async def run(self) -> None:
        """Repair gaps as they come, and at once those that an earlier process left; until cancelled."""
        wait_s = _FIRST_WAIT_S
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            try:
                await self._await_backfill()
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

    async def _bound(self, at: datetime) -> list[int]:
        ids: list[int] = [gap.gap_id for gap in await self._ledger.gaps("open")]
        before = datetime_to_snowflake(at + _MARGIN)
        if not ids:
            ids = await self._opened_at_start(at)
        for gap_id in ids:
            await self._ledger.bound(gap_id, before)
        return ids

    async def _opened_at_start(self, at: datetime) -> list[int]:
        """The gap between an earlier process and this one, or what the very first start fetches."""
        if await self._ledger.reached():
            return [await self._open("restart")]
        if not self._options.first_start_back_s:
            return []
        since = at - timedelta(seconds=self._options.first_start_back_s)
        return [await self._ledger.open(FIRST_START, since, datetime_to_snowflake(since))]

    async def _waiting_gaps(self) -> list[Gap]:
        waiting = await self._ledger.gaps("closed")
        self.status.open_gaps = len(waiting)
        return waiting

    async def _await_backfill(self) -> None:
        """Wait for the end of a backfill under way, and mark what it filled."""
        began = datetime.now(UTC)
        while (pending := self._backfill) is not None:
            if self._is_filled(pending):
                await self._settle_backfill(pending)
                return
            if (datetime.now(UTC) - began).total_seconds() > _BACKFILL_PATIENCE_S:
                self._backfill = None
            await asyncio.sleep(_LOOK_EVERY_S)

    def _is_filled(self, pending: _Backfill) -> bool:
        """Older posts come first: once newer ones have come for a while there are no older ones. A stream that brings
        nothing has none either, once it has been silent for so long that it would have been left if it were dead.
        """
        settle = timedelta(seconds=self._options.settle_s)
        quiet = settle + timedelta(seconds=self._stall_s + _STALL_MARGIN_S)
        waited = datetime.now(UTC) - pending.last_older_at
        is_followed = waited >= settle and pending.newest - pending.reached >= settle
        return is_followed or (waited >= quiet and self._is_idle())

    async def _settle_backfill(self, pending: _Backfill) -> None:
        gaps = [gap for gap in await self._waiting_gaps() if gap.gap_id in pending.gap_ids]
        for gap in gaps:
            posts = await self._ledger.stored_in(gap)
            if self._backfill is not pending:
                return
            await self._settle([gap], "repaired", posts, "backfill")
        self._backfill = None

    async def _repair(self, gaps: Sequence[Gap]) -> None:
        """Fetch what the overlapping `gaps` lack and mark them."""
        now = datetime.now(UTC)
        before = max(gap.before_post_id or datetime_to_snowflake(now) for gap in gaps)
        after = min(gap.after_post_id or before for gap in gaps)
        if not self._options.enabled:
            await self._settle(gaps, "accepted", 0, None, "repair is turned off")
        elif not await self._repair_by_replay(gaps, after, before, now):
            await self._repair_by_search(gaps, after, before, now)

    async def _repair_by_replay(self, gaps: Sequence[Gap], after: int, before: int, now: datetime) -> bool:
        """Whether X took a replay of the whole span, which then is whole."""
        since = snowflake_to_datetime(max(after - _ids(self._options.overlap_s), 0))
        if self._replay is None or since < now - REPLAYABLE:
            return False
        until = snowflake_to_datetime(before) + timedelta(seconds=self._options.settle_s)
        # What has just been published reaches a replay no sooner than the stream.
        await asyncio.sleep(max((until - datetime.now(UTC)).total_seconds(), 0.0))
        try:
            repaired = await self._replayed(since, until)
        except StreamError as error:
            if error.details.get("status") not in (400, 401, 403, 404):
                raise
            _log.warning("repair.replay_refused", reason=error.message)
            return False
        await self._settle(gaps, "repaired", repaired, "replay")
        return True

    async def _replayed(self, since: datetime, until: datetime) -> int:
        """Store what replays bring, and return how many posts were new.

        X ends one that is whole as it ends one that it cuts off. So it is asked again from the newest post on, until
        that brings nothing new.
        """
        repaired = 0
        while since < until:
            new, newest = await self._replayed_once(since, until)
            repaired += new
            if not new:
                break
            since = max(since, newest - timedelta(seconds=self._options.overlap_s))
        return repaired

    async def _replayed_once(self, since: datetime, until: datetime) -> tuple[int, datetime]:
        """How many posts were new, and when the newest of all was made."""
        assert self._replay is not None
        lines, new, newest = await self._replay.open(since, until), 0, since
        try:
            async for batch in lines:
                parsed = [parse_line(line) for line in batch]
                posts = [one for one in parsed if isinstance(one, Post)]
                metrics.POSTS_RECEIVED.labels("replay").inc(len(posts))
                new += await self._found.store(posts, means="replay")
                newest = max(newest, *(snowflake_to_datetime(post.post_id) for post in posts), since)
                for one in parsed:
                    if isinstance(one, Bad):
                        await self._found.put_aside(one)
                    elif isinstance(one, StreamProblem) and one.kind == "operational-disconnect":
                        raise StreamError("X ended the replay before it was over", cause="disconnect")
        finally:
            await lines.close()
        return new, newest

    async def _repair_by_search(self, gaps: Sequence[Gap], after: int, before: int, now: datetime) -> None:
        oldest = datetime_to_snowflake(now - _SEARCHABLE)
        since = max(after - _ids(self._options.overlap_s), oldest)
        reason, repaired = self._shortcoming if after >= oldest else "search reaches back seven days", 0
        if since < before and self._queries:
            try:
                repaired = await self._fetch(since, before)
            except StreamError as error:
                if error.details.get("status") not in (400, 403):
                    raise
                self._note(error)
                reason = "X refuses the search"
        ending: Ending = "repaired" if reason is None else "partly_repaired" if repaired else "accepted"
        await self._settle(gaps, ending, repaired, "search", reason)

    async def _settle(
        self, gaps: Sequence[Gap], ending: Ending, posts: int, means: Means | None, reason: str | None = None
    ) -> None:
        for gap in gaps:
            await self._ledger.settle(gap, ending, posts if gap is gaps[0] else 0, means, reason)
        self.status.open_gaps -= len(gaps)
        self.status.repaired_posts += posts
        ids = [gap.gap_id for gap in gaps]
        _log.info("gap.closed", gaps=ids, cause=gaps[0].cause, ending=ending, means=means, posts=posts, reason=reason)

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
            new += await self._found.store(posts, means="search")
            token, wait_s = (answer.get("meta") or {}).get("next_token"), _FIRST_WAIT_S
            if not token:
                return new

    def _note(self, error: OvertoneError) -> None:
        if error.message != self.status.last_error:
            _log.warning("repair.delayed", code=error.code, reason=error.message)
        self.status.last_error = error.message


def _posts_of(answer: Mapping[str, object], tag: str | None) -> list[Post]:
    posts: list[Post] = []
    for message in messages_of_search(dict(answer)):
        if tag is not None:
            message["matching_rules"] = [{"tag": tag}]
        post = post_of(message)
        if isinstance(post, Post):
            posts.append(post)
    return posts


def _ids(seconds: float) -> int:
    """How much ids grow in `seconds`."""
    return int(seconds * 1000) << 22
