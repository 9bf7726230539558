"""The gaps of one stream as its leader may write them, and which of them one repair fills."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from overtone import metrics
from overtone.db.database import Database
from overtone.db.gaps import Ending, Gap, GapState, Means, close_gap, list_gaps, open_gap, posts_between, settle_gap
from overtone.db.posts import cursor
from overtone.schema import snowflake_to_datetime

_MAX_GAPS = 10_000
FIRST_START = "first_start"
"""Cause of what the very first start fetches: nobody was there who could have missed it."""


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

    async def settle(self, gap: Gap, ending: Ending, posts: int, means: Means | None, reason: str | None) -> None:
        """What became of the gap."""
        await settle_gap(
            self.db, gap.gap_id, ending, repaired_posts=posts, means=means, reason=reason, epoch=self.epoch
        )
        if gap.cause != FIRST_START:
            metrics.GAP_SECONDS.labels(ending).inc(_length_s(gap))

    async def stored_in(self, gap: Gap) -> int:
        """How many posts of the stream are stored that lie in `gap`."""
        return await posts_between(self.db, self.stream, gap.after_post_id or 0, gap.before_post_id or 0)


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


def _length_s(gap: Gap) -> float:
    end = snowflake_to_datetime(gap.before_post_id) if gap.before_post_id else gap.ended_at or gap.started_at
    return max((end - gap.started_at).total_seconds(), 0.0)
