"""What is stored, compared with what the simulator's ledger says it sent."""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from benchmarks.day.api import STAND_IN_CONFIDENCE
from overtone.db.database import Database
from overtone.db.gaps import Gap, list_gaps

_PAGE = 200_000
_MOST_CONNECTS = 50
"""What X allows in 15 minutes."""


@dataclass(slots=True)
class Verdict:
    """The account of a day. Whole when nothing is missing without a name, left over, or without a prediction."""

    published: int
    deleted: int
    stored: int
    predicted: int
    missing: int
    """Published, not deleted and not stored."""
    unexplained: int
    """Of the missing, those in no gap that says that it could not be repaired."""
    left_over: int
    """Deleted, and stored all the same."""
    strangers: int
    """Stored, and never published."""
    without_prediction: int
    doubled: int
    """Posts with more than one prediction of a model."""
    tallied: int
    """Posts as `/stats` counts them."""
    gaps: dict[str, int] = field(default_factory=dict)
    most_attempts: int = 0
    """The most requests for the stream in 15 minutes."""
    faults: dict[str, int] = field(default_factory=dict)
    unsettled: int = 0
    """Gaps that are not over, or wait for repair."""
    by_model: int = 0
    """Predictions that the model made; the rest are of the engine without one."""

    @property
    def is_whole(self) -> bool:
        """Whether all that was sent and not deleted is stored and predicted once, every gap has ended and every
        difference has the name of one, and X was asked for the stream no more often than it allows.
        """
        wrong = self.unexplained + self.left_over + self.strangers + self.without_prediction + self.doubled
        wrong += self.unsettled
        return wrong == 0 and self.tallied == self.stored and self.most_attempts <= _MOST_CONNECTS

    def shown(self) -> dict[str, Any]:
        """The account for JSON."""
        return {**asdict(self), "is_whole": self.is_whole}


async def read_ledger(url: str, state: str) -> tuple[Mapping[str, Any], set[int]]:
    """The ledger of the simulator at `url`, and all ids in `state`."""
    found: set[int] = set()
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=60)) as session:
        since = 0
        while True:
            parameters = {"state": state, "since_id": str(since), "limit": str(_PAGE)}
            async with session.get("/simulator/ledger", params=parameters) as response:
                ledger: dict[str, Any] = await response.json()
            ids = [int(one) for one in ledger["ids"]]
            found.update(ids)
            if len(ids) < _PAGE:
                return ledger, found
            since = ids[-1]


async def judge(db: Database, url: str, source: str = "simulator") -> Verdict:
    """Compare the database with the ledger at `url`.

    Raises:
        DatabaseUnavailableError: the database is away.
    """
    ledger, published = await read_ledger(url, "published")
    _, deleted = await read_ledger(url, "gone")
    async with db.acquire() as connection:
        stored = {row[0] for row in await connection.fetch("SELECT post_id FROM overtone.posts")}
        predictions = await connection.fetch("SELECT post_id FROM overtone.predictions")
        by_model = await connection.fetchval(
            "SELECT count(*) FROM overtone.predictions WHERE confidence <> $1::real", STAND_IN_CONFIDENCE
        )
        tallied = await connection.fetchval(
            "SELECT coalesce(sum(count), 0) FROM overtone.tallies WHERE kind = 'posts' AND minute = '-infinity'"
        )
    predicted = {row[0] for row in predictions}
    gaps = await list_gaps(db, source, limit=100_000)
    missing = published - deleted - stored
    counts: dict[str, int] = {}
    for gap in gaps:
        counts[f"{gap.cause}: {gap.state}"] = counts.get(f"{gap.cause}: {gap.state}", 0) + 1
    return Verdict(
        published=len(published),
        deleted=len(deleted),
        stored=len(stored),
        predicted=len(predicted),
        missing=len(missing),
        unexplained=len(outside(missing, gaps)),
        left_over=len(stored & deleted),
        strangers=len(stored - published),
        without_prediction=len(stored - predicted),
        doubled=len(predictions) - len(predicted),
        tallied=int(tallied),
        gaps=counts,
        most_attempts=int(ledger["most_attempts_in_window"]),
        faults=dict(ledger["faults"]),
        unsettled=sum(gap.state in ("open", "closed") for gap in gaps),
        by_model=int(by_model),
    )


def outside(ids: Set[int], gaps: list[Gap]) -> set[int]:
    """Those of `ids` that lie in none of `gaps` that were given up or repaired only in part."""
    named = [gap for gap in gaps if gap.state not in ("open", "closed", "repaired")]
    return {
        one for one in ids if not any((gap.after_post_id or 0) < one < (gap.before_post_id or 2**63) for gap in named)
    }
