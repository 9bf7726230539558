"""A report of some days, in numbers: no text, no id of a post or an author."""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from overtone.db.database import Connection, Database
from overtone.db.queries import query
from overtone.errors import InvalidInputError

UNSURE = 0.6
"""Confidence below which a prediction is counted as unsure."""
PATIENCE_S = 120.0
"""How long a report may take; the server ends a statement that takes longer."""

_Rows = Sequence[asyncpg.Record]


async def make_report(db: Database, *, days: int, patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """What happened within so many days until now, as plain values for JSON. All of it is of one moment.

    Shares and means are from 0 to 1, and None where there is nothing to divide by. What was erased is not counted,
    except as an erasure.

    Raises:
        InvalidInputError: so many days take longer than `patience_s`.
        DatabaseUnavailableError: the database cannot be reached.
    """
    async with db.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        until: datetime = await connection.fetchval("SELECT now()")
        since = until - timedelta(days=days)
        look = _Look(connection, since, until, patience_s)
        (posts,) = await look.fetch("report_posts")
        predictions = await look.fetch("report_predictions", UNSURE)
        feedback = await look.fetch("report_feedback")
        gaps = await look.fetch("report_gaps")
        (ledgers,) = await look.fetch("report_ledgers")
        jobs = await look.fetch("report_jobs")
    return {
        "days": days,
        "since": since.isoformat(),
        "until": until.isoformat(),
        "posts": {"stored": posts["posts"]},
        "predictions": {
            **_predictions(predictions),
            "unsure_below": UNSURE,
            "versions": [{"model_version": name, **_predictions(rows)} for name, rows in _by_version(predictions)],
        },
        "feedback": {
            **_feedback(feedback),
            "versions": [
                {"model_version": name, **_feedback(rows)} for name, rows in _by_version(feedback) if name is not None
            ],
        },
        "gaps": {
            "states": {row["state"]: row["gaps"] for row in gaps},
            "seconds": round(sum(row["seconds"] for row in gaps), 3),
            "repaired_posts": sum(row["repaired_posts"] for row in gaps),
        },
        "dead_letters": {"new": ledgers["new_letters"], "waiting": ledgers["waiting_letters"]},
        "jobs": {row["state"]: row["jobs"] for row in jobs},
        "erasures": {"posts": ledgers["erased_posts"], "authors": ledgers["erased_authors"]},
    }


class _Look:
    """Statements about one span of time, which have so many seconds in all."""

    def __init__(self, connection: Connection, since: datetime, until: datetime, patience_s: float) -> None:
        self._connection = connection
        self._span = since, until
        self._patience_s = patience_s
        self._ends_at = time.monotonic() + patience_s

    async def fetch(self, name: str, *more: Any) -> _Rows:
        """The rows of the statement `name`.

        Raises:
            InvalidInputError: there is no time left for it.
        """
        left_ms = max(int((self._ends_at - time.monotonic()) * 1000), 1)
        await self._connection.execute("SELECT set_config('statement_timeout', $1, true)", str(left_ms))
        try:
            # The server's own limit comes first, and leaves the connection usable.
            rows: _Rows = await self._connection.fetch(query(name), *self._span, *more, timeout=self._patience_s + 10)
        except asyncpg.QueryCanceledError:
            if time.monotonic() < self._ends_at - 0.1:
                raise
            days = (self._span[1] - self._span[0]).days
            said = f"A report of {days} days takes longer than {self._patience_s:.0f} s here: ask for fewer days."
            raise InvalidInputError(said) from None
        return rows


def _predictions(rows: _Rows) -> dict[str, Any]:
    stored = sum(row["predictions"] for row in rows)
    labels: dict[str, int] = {}
    for row in rows:
        labels[row["label"]] = labels.get(row["label"], 0) + row["predictions"]
    return {
        "stored": stored,
        "labels": labels,
        "mean_confidence": _share(sum(row["confidence"] for row in rows), stored),
        "unsure": _share(sum(row["unsure"] for row in rows), stored),
    }


def _feedback(rows: _Rows) -> dict[str, Any]:
    given, compared, agreeing = (sum(row[name] for row in rows) for name in ("given", "compared", "agreeing"))
    return {"given": given, "compared": compared, "agreement": _share(agreeing, compared)}


def _by_version(rows: _Rows) -> list[tuple[str | None, _Rows]]:
    versions = dict.fromkeys(row["model_version"] for row in rows)
    return [(version, [row for row in rows if row["model_version"] == version]) for version in versions]


def _share(part: float, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
