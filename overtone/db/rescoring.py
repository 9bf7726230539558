"""Stored posts that lack a prediction by one version of the model: found in slices, read slice by slice.

What is left to do follows from the predictions that are stored, and from nothing else: whoever is cut off begins again
with what is left. Erased posts, and posts of erased authors, are never among it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from overtone.db.database import Database
from overtone.db.partitions import bounds, existing, month_of, partition_name
from overtone.db.queries import query
from overtone.errors import DatabaseUnavailableError, UnavailableError
from overtone.schema import datetime_to_snowflake

_LOOKED_AT = 50_000
"""Posts that one statement of the plan looks at: a tenth of a second."""

_LOCK = "overtone.rescoring"


@dataclass(frozen=True, slots=True)
class Slice:
    """A span of post ids within one month's partition, both ends included."""

    first: int
    last: int
    posts: int
    """How many within it lacked a prediction when it was planned."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to do for one version."""

    stored: int
    """Posts looked at."""
    slices: tuple[Slice, ...]
    """Oldest first."""

    @property
    def posts(self) -> int:
        """Posts that lack a prediction."""
        return sum(one.posts for one in self.slices)


async def plan_rescoring(db: Database, model_version: str, *, since: datetime | None = None, rows: int) -> Plan:
    """Slices of at most `rows` posts each, of the posts stored by now and made `since` then.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
    """
    async with db.acquire() as connection:
        newest = await connection.fetchval("SELECT max(post_id) FROM overtone.posts")
        present = await existing(connection)
    if newest is None:
        return Plan(0, ())
    first = datetime_to_snowflake(since) if since else 0
    stored, slices = 0, list[Slice]()
    for month in range(month_of(first), month_of(newest) + 1):
        if partition_name("posts", month) not in present:
            continue
        begin, end = bounds(month)
        after = max(first, begin) - 1
        while True:
            async with db.acquire() as connection:
                *found, looked = await connection.fetch(
                    query("rescore_plan"), after, min(end, newest + 1), _LOOKED_AT, model_version, rows
                )
            stored += looked["posts"]
            slices += [Slice(one["first"], one["last"], one["posts"]) for one in found]
            if looked["posts"] < _LOOKED_AT:
                break
            after = looked["last"]
    return Plan(stored, tuple(slices))


async def posts_to_rescore(db: Database, model_version: str, first: int, last: int) -> list[tuple[int, str]]:
    """Posts (id, text) from id `first` to `last` that lack a prediction by `model_version`, oldest first.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
    """
    async with db.acquire() as connection:
        rows = await connection.fetch(query("rescore_posts"), first, last, model_version)
    return [(row["post_id"], row["text"]) for row in rows]


@asynccontextmanager
async def only_rescoring(db: Database, model_version: str) -> AsyncIterator[None]:
    """Keep a connection of `db` and, by it, every other process from re-scoring with `model_version` meanwhile.

    Raises:
        UnavailableError: another process does so now.
    """
    is_over = False
    try:
        async with db.acquire() as connection:
            name = f"{_LOCK} {model_version}"
            if not await connection.fetchval("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", name):
                raise UnavailableError(f"Another command is re-scoring posts with {model_version}.")
            yield
            is_over = True
            # The pool unlocks what a connection holds when it comes back.
    except DatabaseUnavailableError:
        # So does a connection that broke.
        if not is_over:
            raise
