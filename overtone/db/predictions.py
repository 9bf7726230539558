"""Writing predictions exactly once, and the figures that people look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg

from overtone.db.database import Connection, Database
from overtone.db.payload import json_text
from overtone.db.queries import query
from overtone.db.tombstones import keep_out_erasures
from overtone.schema import LABELS, Prediction
from overtone.text import storable

_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows that are stored."""

    posts: int
    predictions: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Rows stored a second, over the running minute and the one before it."""

    posts: float
    predictions: float


@dataclass(frozen=True, slots=True)
class MinuteCounts:
    """Predictions stored within one minute, by label."""

    minute: datetime
    labels: dict[str, int]


@dataclass(frozen=True, slots=True)
class NewestPost:
    """A post and its latest prediction, if it has one."""

    post_id: int
    text: str
    created_at: datetime
    label: str | None
    confidence: float | None
    model_version: str | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What the page shows."""

    posts: int
    """Posts stored and not erased since the database was made."""
    predictions: int
    labels: dict[str, int]
    """Predictions by label."""
    per_second: Rates
    series: list[MinuteCounts]
    """The last minutes, oldest first, those without predictions included."""
    newest: list[NewestPost]
    """Newest first."""
    model_version: str | None
    """The model of the newest prediction among `newest`."""
    source: str | None
    """The stream that stored last."""


async def write_predictions(db: Database, rows: Sequence[tuple[int, Prediction]]) -> int:
    """Store predictions (post id, prediction) and return how many were new.

    One transaction stores them and adds to the tallies; it may be repeated. A post has one prediction a model
    version: the first one stays. A prediction for a post that is not stored, or was erased, is dropped.

    Raises:
        DatabaseUnavailableError: nothing was stored, or the answer was lost; repeat the call.
    """
    if not rows:
        return 0
    async with db.transaction() as connection:
        await keep_out_erasures(connection)
        return await insert_predictions(connection, rows)


async def insert_predictions(connection: Connection, rows: Sequence[tuple[int, Prediction]]) -> int:
    """The same within a transaction of the caller, which keeps out erasures."""
    if not rows:
        return 0
    ordered = sorted(rows, key=lambda row: (row[0], row[1].model_version))
    ids = [post_id for post_id, _ in ordered]
    stored = await connection.fetch(
        query("write_predictions"),
        ids,
        [storable(prediction.model_version) for _, prediction in ordered],
        [storable(prediction.label) for _, prediction in ordered],
        [prediction.confidence for _, prediction in ordered],
        [json_text(prediction.scores) for _, prediction in ordered],
        ids[0],
        ids[-1],
    )
    if stored:
        labels, numbers = zip(*((row["label"], row["count"]) for row in stored), strict=True)
        await connection.execute(query("add_tallies"), "predictions", labels, numbers)
    return sum(row["count"] for row in stored)


async def counts(db: Database) -> Counts:
    """Exact numbers of rows, by counting them: slow on a large database."""
    async with db.acquire() as connection:
        row = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM overtone.posts) AS posts,"
            " (SELECT count(*) FROM overtone.predictions) AS predictions"
        )
    assert row is not None
    return Counts(**row)


async def stats(db: Database, *, minutes: int = 30, newest: int = 50) -> Stats:
    """The figures of the last `minutes` and the `newest` posts, from the tallies: the time it takes does not grow."""
    async with db.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        tallied = await connection.fetch(query("read_tallies"), max(minutes, 2))
        recent = [NewestPost(**row) for row in await connection.fetch(query("newest_posts"), newest)]
        source = await connection.fetchval("SELECT stream FROM overtone.stream_cursor ORDER BY moved_at DESC LIMIT 1")
    now = tallied[0]["now"] if tallied else datetime.now(UTC)
    sums = {(row["kind"], row["label"]): int(row["count"]) for row in tallied if row["minute"] is None}
    per_minute = [row for row in tallied if row["minute"] is not None]
    labels = {label: sums.get(("predictions", label), 0) for label in _labels(sums)}
    return Stats(
        posts=sums.get(("posts", ""), 0),
        predictions=sum(labels.values()),
        labels=labels,
        per_second=Rates(_rate(per_minute, "posts", now), _rate(per_minute, "predictions", now)),
        series=_series(per_minute, list(labels), now, minutes),
        newest=recent,
        model_version=next((post.model_version for post in recent if post.model_version), None),
        source=source,
    )


def _labels(sums: dict[tuple[str, str], int]) -> list[str]:
    found = {label for kind, label in sums if kind == "predictions"}
    return [*LABELS, *sorted(found.difference(LABELS))]


def _rate(rows: Sequence[asyncpg.Record], kind: str, now: datetime) -> float:
    since = now.replace(second=0, microsecond=0) - _MINUTE
    counted = {row["minute"]: 0 for row in rows if row["kind"] == kind and row["minute"] >= since}
    for row in rows:
        if row["kind"] == kind and row["minute"] in counted:
            counted[row["minute"]] += row["count"]
    if not counted:
        return 0.0
    return float(sum(counted.values()) / max((now - min(counted)).total_seconds(), 1.0))


def _series(rows: Sequence[asyncpg.Record], labels: list[str], now: datetime, minutes: int) -> list[MinuteCounts]:
    last = now.replace(second=0, microsecond=0)
    shown = {last - _MINUTE * back: dict.fromkeys(labels, 0) for back in reversed(range(minutes))}
    for row in rows:
        if row["kind"] == "predictions" and row["minute"] in shown:
            shown[row["minute"]][row["label"]] = int(row["count"])
    return [MinuteCounts(minute, by_label) for minute, by_label in shown.items()]
