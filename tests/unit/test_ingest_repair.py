"""When a backfill is over, by the clock of X and by ours."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest

from ingest.options import IngestOptions, RepairOptions
from ingest.repair import Repairer
from overtone.db.gaps import Ending, Gap, GapState, Means
from overtone.schema import Post, datetime_to_snowflake

SETTLE = timedelta(seconds=0.2)


class OneGap:
    """A ledger with one gap: open, then over, then settled. `stored` posts lie in it."""

    def __init__(self) -> None:
        self.stored = 0
        self.state: GapState = "open"
        self.ending: tuple[Ending, int, Means | None] | None = None

    async def gaps(self, state: GapState) -> list[Gap]:
        began = datetime.now(UTC)
        gap = Gap(7, "s", "closed", began, began, 1, 2, self.state, repaired_posts=0)
        return [gap] if state == self.state else []

    async def bound(self, gap_id: int, before_post_id: int) -> None:
        self.state = "closed"

    async def stored_in(self, gap: Gap) -> int:
        return self.stored

    async def settle(self, gap: Gap, ending: Ending, posts: int, means: Means | None, reason: str | None) -> None:
        self.state, self.ending = ending, (ending, posts, means)


def made_at(moment: datetime) -> Post:
    return Post(datetime_to_snowflake(moment), 7, "a text", moment)


@pytest.mark.parametrize("ahead_s", [-3_600.0, 0.0, 0.9, 3_600.0])
async def test_a_backfill_is_not_over_before_it_has_come(ahead_s: float) -> None:
    """However far the clock of X is from ours: its header counts whole seconds, so even a right one may be ahead."""
    ledger = OneGap()
    options = IngestOptions(plan="enterprise", repair=RepairOptions(settle_s=SETTLE.total_seconds()))
    repairer = Repairer(ledger, None, options=options, found=None)  # type: ignore[arg-type]
    at = datetime.now(UTC) + timedelta(seconds=ahead_s)
    await repairer.note_connected(at, is_backfilled=True)
    running = asyncio.create_task(repairer.run())
    try:
        await asyncio.sleep(0)
        assert ledger.ending is None
        ledger.stored = 3
        repairer.note_stored([made_at(at - timedelta(seconds=back)) for back in (3, 2, 1)])
        repairer.note_stored([made_at(at + SETTLE)])
        async with asyncio.timeout(30):
            while ledger.ending is None:  # noqa: ASYNC110  it spans a task of its own
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert ledger.ending == ("repaired", 3, "backfill")
