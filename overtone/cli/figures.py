"""How much is stored, and whether predictions have caught up with posts."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from overtone.bundle import load_bundle
from overtone.cli.plan import Plan
from overtone.db.database import Database
from overtone.db.posts import unclassified
from overtone.db.predictions import Counts, counts
from overtone.errors import DatabaseUnavailableError, UnavailableError

_STEP_S = 0.5
_WINDOW = timedelta(days=8)


@dataclass(frozen=True, slots=True)
class Totals:
    """What is stored."""

    posts: int
    predictions: int


async def await_drained(plan: Plan, timeout_s: float, tick: Callable[[], None]) -> Totals:
    """Wait until no post of the last days lacks a prediction and no more come; return what is stored.

    With `timeout_s` 0, just count.

    Raises:
        UnavailableError: that was not so within `timeout_s`.
    """
    version = load_bundle(plan.settings.bundle).version
    deadline = time.monotonic() + timeout_s
    before: Counts | None = None
    while True:
        tick()
        try:
            now, missing = await _look(plan.database_url, version)
        except DatabaseUnavailableError:
            if time.monotonic() > deadline:
                raise
            now, missing = None, True
        if now is not None and (timeout_s == 0 or (not missing and now == before)):
            return Totals(now.posts, now.predictions)
        if time.monotonic() > deadline:
            stored = f" {now.posts} posts and {now.predictions} predictions are stored." if now else ""
            raise UnavailableError(f"Predictions did not catch up with posts within {timeout_s:.0f} s.{stored}")
        before = now
        await asyncio.sleep(_STEP_S)


async def _look(url: str, version: str) -> tuple[Counts, bool]:
    db = await Database.open(url, max_size=1, application_name="overtone-up")
    try:
        missing = await unclassified(db, version, since=datetime.now(UTC) - _WINDOW, limit=1)
        return await counts(db), bool(missing)
    finally:
        await db.close()
