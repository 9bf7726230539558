"""Monthly partitions of `posts` and `predictions`: which ids they hold, and making them before they are needed.

A month is counted as `year * 12 + month - 1`. A partition holds the post ids that were made in its month (UTC).
The first month also takes the ids from before snowflakes, so every post X ever had falls into some partition.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from overtone.db.database import Connection, Database
from overtone.db.tables import PARTITIONED, SCHEMA
from overtone.logging import get_logger
from overtone.schema import datetime_to_snowflake, snowflake_to_datetime

AHEAD_DAYS = 35
"""Partitions are made this far ahead: always at least the whole next month."""

BEHIND_DAYS = 8
"""The span a search may fill again after a gap; its partitions are made at once."""

FUTURE_LIMIT = timedelta(days=1)
"""An id whose time is further ahead than this is not a post id: clocks are not that wrong."""

_LOCK = 0x6F76_7274_7061_7274

_log = get_logger()


def month_of(post_id: int) -> int:
    """The month whose partition holds `post_id`."""
    instant = snowflake_to_datetime(post_id)
    return instant.year * 12 + instant.month - 1


def bounds(month: int) -> tuple[int, int]:
    """The first post id of `month` and the first of the month after it."""
    return datetime_to_snowflake(_start(month)), datetime_to_snowflake(_start(month + 1))


def partition_name(table: str, month: int) -> str:
    """The name, without schema, of the partition of `table` for `month`."""
    return f"{table}_{month // 12:04d}_{month % 12 + 1:02d}"


def months_between(first: datetime, last: datetime) -> range:
    """The months from that of `first` to that of `last`, both included."""
    return range(first.year * 12 + first.month - 1, last.year * 12 + last.month)


def plausible_ids(now: datetime) -> range:
    """The post ids that X can have made by `now`, give or take `FUTURE_LIMIT`."""
    return range(1, datetime_to_snowflake(now + FUTURE_LIMIT))


async def ensure_partitions(db: Database, *, ahead_days: int = AHEAD_DAYS, behind_days: int = BEHIND_DAYS) -> list[str]:
    """Make what is missing of the partitions from `behind_days` ago to `ahead_days` ahead; return the new ones' names.

    Safe to call from several processes at once and as often as one likes.
    """
    now = datetime.now(UTC)
    async with db.transaction() as connection:
        return await make_months(
            connection, months_between(now - timedelta(days=behind_days), now + timedelta(days=ahead_days))
        )


async def ensure_months(db: Database, post_ids: Sequence[int]) -> None:
    """Make what is missing of the partitions that hold `post_ids`, which ascend and are plausible."""
    months, at = set[int](), 0
    while at < len(post_ids):
        month = month_of(post_ids[at])
        months.add(month)
        at = bisect_left(post_ids, bounds(month)[1], at + 1)
    missing = months - db.known_months
    if not missing:
        return
    async with db.transaction() as connection:
        await make_months(connection, sorted(missing))
    db.known_months |= missing


async def make_months(connection: Connection, months: Iterable[int]) -> list[str]:
    """Make the partitions of `months` that do not exist, inside the transaction of `connection`."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    present = await existing(connection)
    made = []
    for month in months:
        for table in PARTITIONED:
            name = partition_name(table, month)
            if name not in present:
                await _make(connection, table, name, bounds(month))
                made.append(name)
    if made:
        _log.info("partitions.made", partitions=made)
    return made


async def existing(connection: Connection) -> set[str]:
    """The names of the partitions that are attached."""
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " JOIN pg_class p ON p.oid = i.inhparent JOIN pg_namespace n ON n.oid = p.relnamespace"
        " WHERE n.nspname = $1 AND p.relname = ANY($2)",
        SCHEMA,
        list(PARTITIONED),
    )
    return {str(row["relname"]) for row in rows}


async def detached(connection: Connection, table: str) -> list[str]:
    """The names of the partitions of `table` that were detached and not dropped, oldest first."""
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = $1 AND c.relkind = 'r' AND c.relname ~ $2"
        " AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid) ORDER BY c.relname",
        SCHEMA,
        rf"^{table}_\d{{4}}_\d{{2}}$",
    )
    return [str(row["relname"]) for row in rows]


async def _make(connection: Connection, table: str, name: str, ids: tuple[int, int]) -> None:
    # CREATE TABLE ... PARTITION OF would lock out every reader of the parent; attaching does not.
    await connection.execute(
        f"CREATE TABLE {SCHEMA}.{name} (LIKE {SCHEMA}.{table} INCLUDING ALL);"
        f"ALTER TABLE {SCHEMA}.{table} ATTACH PARTITION {SCHEMA}.{name} FOR VALUES FROM ({ids[0]}) TO ({ids[1]})"
    )


def _start(month: int) -> datetime:
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC)
