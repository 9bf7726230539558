"""Decisions to retrain: what they are made from, what came of them, and one at a time."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from overtone.db.database import Database
from overtone.db.payload import json_text
from overtone.db.queries import query
from overtone.schema import datetime_to_snowflake

BUCKETS = 50
"""Equal parts of the range of confidence, 0 to 1, that a `Profile` counts."""

_LOCK = 0x6F76_7274_7274_726E
_SLICES = 24
_SLICE_ROWS = 5_000
_KEPT = "90 days"
"""How long a decision that no run came of is kept."""

Ended = Literal["succeeded", "failed"]


@dataclass(frozen=True, slots=True)
class Run:
    """A training run that a check ordered."""

    name: str
    """Also the id under which its job is submitted."""
    entrypoint: str
    decided_at: datetime
    is_submitted: bool
    """False for a run that the job server may not know yet."""


@dataclass(frozen=True, slots=True)
class History:
    """What came of earlier decisions."""

    open_run: Run | None
    """The run that has not ended, as far as is known here."""
    learned_at: datetime | None
    """When the newest run that did not fail was decided on: what came before is learned."""
    failures: int
    """Runs that failed since."""
    failed_at: datetime | None
    """When the newest of these ended."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels that may be trained on."""

    total: int
    fresh: int
    """Given or changed since labels were last counted."""
    first_at: datetime | None
    counted_at: datetime


@dataclass(frozen=True, slots=True)
class Profile:
    """How predictions of one version were spread, over posts of one stretch of time."""

    model_version: str
    labels: Mapping[str, int]
    """Predictions by label."""
    buckets: tuple[int, ...]
    """Predictions by confidence, in `BUCKETS` equal parts of 0 to 1."""
    mean_confidence: float

    @property
    def rows(self) -> int:
        """How many predictions."""
        return sum(self.labels.values())


@asynccontextmanager
async def only_one(db: Database) -> AsyncIterator[bool]:
    """Whether nobody else is within such a block; the lock goes with its connection, however that ends."""
    async with db.acquire() as connection:
        has_lock = bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK))
        try:
            yield has_lock
        finally:
            if has_lock:
                await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


async def history(db: Database) -> History:
    """What came of earlier decisions."""
    async with db.acquire() as connection:
        found = await connection.fetchrow(
            "SELECT run, entrypoint, decided_at, submitted_at FROM overtone.retrain_decisions WHERE state = 'open'"
        )
        learned_at = await connection.fetchval(
            "SELECT max(decided_at) FROM overtone.retrain_decisions WHERE state IN ('open', 'succeeded')"
        )
        failed = await connection.fetchrow(
            "SELECT count(*) AS failures, max(ended_at) AS failed_at FROM overtone.retrain_decisions"
            " WHERE state = 'failed' AND ($1::timestamptz IS NULL OR decided_at > $1)",
            learned_at,
        )
    assert failed is not None
    run = None
    if found is not None:
        run = Run(found["run"], found["entrypoint"], found["decided_at"], found["submitted_at"] is not None)
    return History(run, learned_at, failed["failures"], failed["failed_at"])


async def count_labels(db: Database, *, with_posts: bool, since: datetime | None) -> Labels:
    """The labels that training would take, and how many of them came after `since`; without it all are new."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(query("new_labels"), with_posts, since)
    assert row is not None
    return Labels(row["total"], row["fresh"], row["first_at"], row["counted_at"])


async def profile(db: Database, first: datetime, last: datetime, model_version: str | None = None) -> Profile | None:
    """How predictions for posts made from `first` until before `last` are spread; None if there is none.

    Without `model_version`, of the version that made most of them. The span is looked at in 24 equal slices, at most
    5,000 predictions each.
    """
    span = (datetime_to_snowflake(first), datetime_to_snowflake(last))
    async with db.acquire() as connection:
        rows = await connection.fetch(
            query("prediction_profile"), *span, _SLICES, _SLICE_ROWS, model_version, BUCKETS, timeout=300.0
        )
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["model_version"]] = sizes.get(row["model_version"], 0) + row["count"]
    if not sizes:
        return None
    chosen = max(sorted(sizes), key=lambda version: sizes[version])
    labels: dict[str, int] = {}
    buckets = [0] * BUCKETS
    confidence = 0.0
    for row in rows:
        if row["model_version"] == chosen:
            labels[row["label"]] = labels.get(row["label"], 0) + row["count"]
            buckets[max(row["bucket"], 1) - 1] += row["count"]
            confidence += row["confidence"]
    return Profile(chosen, labels, tuple(buckets), confidence / sizes[chosen])


async def record_wait(db: Database, decided_at: datetime, detail: Mapping[str, Any], model_version: str | None) -> None:
    """Keep a decision against a run, and let go of such decisions after 90 days."""
    async with db.transaction() as connection:
        await connection.execute(
            "DELETE FROM overtone.retrain_decisions WHERE run IS NULL AND decided_at < now() - $1::text::interval",
            _KEPT,
        )
        await connection.execute(
            "INSERT INTO overtone.retrain_decisions (decided_at, outcome, detail, model_version)"
            " VALUES ($1, 'waits', $2::jsonb, $3)",
            decided_at,
            json_text(detail),
            model_version,
        )


async def claim_run(db: Database, run: Run, detail: Mapping[str, Any], model_version: str | None) -> bool:
    """Keep the decision for `run`, before its job is submitted; False, and nothing kept, while another run is open."""
    async with db.acquire() as connection:
        claimed = await connection.fetchval(
            "INSERT INTO overtone.retrain_decisions"
            " (decided_at, outcome, detail, model_version, run, entrypoint, state)"
            " VALUES ($1, 'submits', $2::jsonb, $3, $4, $5, 'open') ON CONFLICT DO NOTHING RETURNING id",
            run.decided_at,
            json_text(detail),
            model_version,
            run.name,
            run.entrypoint,
        )
    return claimed is not None


async def mark_submitted(db: Database, name: str) -> None:
    """Note that the job server has the job of the run `name`."""
    async with db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.retrain_decisions SET submitted_at = coalesce(submitted_at, now()) WHERE run = $1", name
        )


async def end_run(db: Database, name: str, state: Ended) -> None:
    """Note how the run `name` ended; a run that ended stays as it is."""
    async with db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.retrain_decisions SET state = $2, ended_at = now() WHERE run = $1 AND state = 'open'",
            name,
            state,
        )
