"""Retention: months that are over their limit are detached without blocking anyone, archived if asked, and dropped."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

from overtone.db.database import Connection, Database
from overtone.db.partitions import detached, ensure_partitions, existing
from overtone.db.tables import PARTITIONED, SCHEMA
from overtone.logging import get_logger

_LOCK = 0x6F76_7274_7265_746E
_SUFFIX = re.compile(r"_(\d{4})_(\d{2})$")
_DETACH_TIMEOUT_S = 3_600.0
_PAGE_ROWS = 5_000

_log = get_logger()

Rows: TypeAlias = AsyncIterator[list[dict[str, Any]]]
Archive: TypeAlias = Callable[[str, Rows], Awaitable[int]]
"""Keeps the rows of a partition, given by name, and returns how many there were."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many whole months are kept, the running one not counted; 0 for ever."""

    posts: int = 6
    predictions: int = 12


@dataclass(slots=True)
class RetentionReport:
    """What was done, or would be."""

    made: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    archived_rows: dict[str, int] = field(default_factory=dict)
    dead_letters: int = 0


def expired(names: set[str], limits: Limits, now: datetime) -> list[str]:
    """Those of the partitions `names` whose month ended longer ago than its table's limit, oldest first."""
    found = []
    for name in names:
        match = _SUFFIX.search(name)
        keep = getattr(limits, name[: match.start()], 0) if match else 0
        if match and keep and int(match[1]) * 12 + int(match[2]) - 1 < now.year * 12 + now.month - 1 - keep:
            found.append(name)
    return sorted(found)


async def plan_retention(db: Database, limits: Limits, now: datetime) -> RetentionReport:
    """What `retain` would drop; it changes nothing."""
    async with db.acquire() as connection:
        names = await existing(connection) | {
            name for table in PARTITIONED for name in await detached(connection, table)
        }
        letters = await connection.fetchval(_COUNT_LETTERS, _oldest_kept(limits, now))
    return RetentionReport(dropped=expired(names, limits, now), dead_letters=int(letters))


async def retain(db: Database, limits: Limits, archive: Archive | None = None) -> RetentionReport:
    """Make the partitions that will be needed, and drop those that are over their limit.

    Nobody who reads or writes waits: partitions are detached concurrently first. One that was detached and not dropped,
    because the process died between, is finished by the next call. With `archive` a partition is dropped only after
    its rows were kept. Two callers at once do the work once.

    Raises:
        DatabaseUnavailableError: not all is done; call again.
    """
    now = datetime.now(UTC)
    report = RetentionReport(made=await ensure_partitions(db))
    async with db.acquire() as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
            _log.info("retention.busy")
            return report
        try:
            await _drop_expired(connection, limits, now, archive, report)
            status = await connection.execute(_DROP_LETTERS, _oldest_kept(limits, now))
            report.dead_letters = int(status.rpartition(" ")[2])
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    db.known_months.clear()
    _log.info("retention.done", made=report.made, dropped=report.dropped, dead_letters=report.dead_letters)
    return report


async def _drop_expired(
    connection: Connection, limits: Limits, now: datetime, archive: Archive | None, report: RetentionReport
) -> None:
    await _finish_detaching(connection)
    attached = await existing(connection)
    for table in PARTITIONED:
        for name in expired({one for one in attached if _SUFFIX.sub("", one) == table}, limits, now):
            # Cannot run inside a transaction; waits for those that use the table, and lets new ones pass.
            await connection.execute(
                f"ALTER TABLE {SCHEMA}.{table} DETACH PARTITION {SCHEMA}.{name} CONCURRENTLY", timeout=_DETACH_TIMEOUT_S
            )
        for name in expired(set(await detached(connection, table)), limits, now):
            if archive is not None:
                report.archived_rows[name] = await _archived(connection, name, archive)
            await connection.execute(f"DROP TABLE {SCHEMA}.{name}")
            report.dropped.append(name)


async def _archived(connection: Connection, name: str, archive: Archive) -> int:
    """Archive `name` as it is, again if something was erased from it meanwhile; return its rows."""
    while True:
        kept = await archive(name, _rows_of(connection, name))
        if kept == await connection.fetchval(f"SELECT count(*) FROM {SCHEMA}.{name}"):
            return kept


async def _finish_detaching(connection: Connection) -> None:
    """Finish what a process that died while detaching left half done."""
    rows = await connection.fetch(
        "SELECT p.relname AS parent, c.relname AS name FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " JOIN pg_class p ON p.oid = i.inhparent JOIN pg_namespace n ON n.oid = p.relnamespace"
        " WHERE i.inhdetachpending AND n.nspname = $1",
        SCHEMA,
    )
    for row in rows:
        await connection.execute(
            f"ALTER TABLE {SCHEMA}.{row['parent']} DETACH PARTITION {SCHEMA}.{row['name']} FINALIZE"
        )


async def _rows_of(connection: Connection, name: str) -> Rows:
    async with connection.transaction(readonly=True):
        # Between two pages an archive far away may take its time.
        await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        page: list[dict[str, Any]] = []
        async for row in connection.cursor(f"SELECT * FROM {SCHEMA}.{name}", prefetch=_PAGE_ROWS):
            page.append(dict(row))
            if len(page) == _PAGE_ROWS:
                yield page
                page = []
        if page:
            yield page


def _oldest_kept(limits: Limits, now: datetime) -> datetime:
    """Dead letters hold posts, so they are kept as long: from this instant on."""
    month = now.year * 12 + now.month - 1 - limits.posts
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC) if limits.posts else datetime(1970, 1, 1, tzinfo=UTC)


_COUNT_LETTERS = "SELECT count(*) FROM overtone.dead_letters WHERE last_seen_at < $1"
_DROP_LETTERS = "DELETE FROM overtone.dead_letters WHERE last_seen_at < $1"
