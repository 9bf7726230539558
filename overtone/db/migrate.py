"""Bringing a database to this version's tables, and telling whether it is there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import asyncpg
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from overtone.db.database import Connection, asyncpg_dsn, connection_errors, translated_errors
from overtone.db.partitions import (
    AHEAD_DAYS,
    BEHIND_DAYS,
    existing,
    make_months,
    months_between,
    partition_name,
)
from overtone.db.tables import PARTITION_NAME, PARTITIONED, SCHEMA, metadata
from overtone.errors import ConfigurationError, DatabaseUnavailableError
from overtone.logging import get_logger

MINIMUM_SERVER = 150_000
"""The oldest server the statements are written for: PostgreSQL 15."""

VERSION_TABLE = "alembic_version"

_LOCK = 0x6F76_7274_6D69_6772
_WARN_AHEAD = timedelta(hours=48)

_log = get_logger()


async def upgrade(url: str) -> None:
    """Bring the database at `url` to the newest revision and make its partitions, all or nothing.

    Two callers at once do the work once: the second waits for the first.

    Raises:
        ConfigurationError: the server is too old, or the database is ahead of this version of Overtone.
        DatabaseUnavailableError: nothing answers there now.
    """
    async with _connected(url) as connection, connection.begin():
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        await _require_server(connection)
        await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        before = await connection.run_sync(_revision)
        try:
            await connection.run_sync(_upgrade)
        except CommandError as error:
            raise ConfigurationError(f"The database cannot be upgraded by this version of Overtone: {error}") from error
        now = datetime.now(UTC)
        months = months_between(now - timedelta(days=BEHIND_DAYS), now + timedelta(days=AHEAD_DAYS))
        await make_months(await _raw(connection), months)
        after = await connection.run_sync(_revision)
    _log.info("database.upgraded", before=before, after=after)


def check(url: str) -> list[str]:
    """What is wrong with the tables at `url`, one sentence each; empty when all is well.

    Looks at the revision, at any difference between the database and `overtone.db.tables`, and at how far ahead
    partitions reach. Not to be called from a running event loop.

    Raises:
        ConfigurationError, DatabaseUnavailableError: as `upgrade`.
    """
    return asyncio.run(_check(url))


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Whether a comparison looks at this schema or table: ours, and no partition."""
    if kind == "schema":
        return name == SCHEMA
    if kind == "table":
        return name is not None and PARTITION_NAME.match(name) is None
    return True


def include_object(_object: Any, name: str | None, kind: str, _reflected: bool, _compare_to: Any) -> bool:
    """The same for reflected objects, which reach a comparison by another way."""
    return kind != "table" or name is None or PARTITION_NAME.match(name) is None


def comparison_options() -> dict[str, Any]:
    """What Alembic must be told to compare this database with the tables."""
    return {
        "include_schemas": True,
        "include_name": include_name,
        "include_object": include_object,
        "version_table": VERSION_TABLE,
        "version_table_schema": SCHEMA,
        "compare_type": True,
        "compare_server_default": True,
    }


def alembic_config() -> Config:
    """Alembic's configuration; there is no ini file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[AsyncConnection]:
    dsn = asyncpg_dsn(url)

    async def connect() -> Any:
        with connection_errors():
            connection = await asyncpg.connect(
                dsn, timeout=10, server_settings={"application_name": "overtone-migrate"}
            )
        # A user called like our schema has it as default schema, where comparisons would then see nothing of ours.
        await connection.execute("SET search_path = public")
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        with translated_errors():
            async with engine.connect() as connection:
                yield connection
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseUnavailableError("The connection broke while the tables were worked on.") from error
        raise
    finally:
        await engine.dispose()


async def _raw(connection: AsyncConnection) -> Connection:
    pooled = await connection.get_raw_connection()
    return cast(Connection, pooled.driver_connection)


async def _require_server(connection: AsyncConnection) -> None:
    version = int(await connection.scalar(text("SHOW server_version_num")) or 0)
    if version < MINIMUM_SERVER:
        raise ConfigurationError(
            f"The server runs PostgreSQL {version // 10_000}; Overtone needs {MINIMUM_SERVER // 10_000} or newer."
        )


def _upgrade(connection: SyncConnection) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _context(connection: SyncConnection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={**comparison_options(), "target_metadata": metadata})


def _revision(connection: SyncConnection) -> str | None:
    return _context(connection).get_current_revision()


async def _check(url: str) -> list[str]:
    async with _connected(url) as connection:
        await _require_server(connection)
        current = await connection.run_sync(_revision)
        head = ScriptDirectory.from_config(alembic_config()).get_current_head()
        if current is None:
            return ["The database has no tables of Overtone yet: run `overtone db upgrade`."]
        if current != head:
            return [f"The database is at revision {current}, this version needs {head}: run `overtone db upgrade`."]
        differences = await connection.run_sync(lambda sync: compare_metadata(_context(sync), metadata))
        found = [f"The database differs from the tables: {_sentence(item)}" for item in differences]
        return found + _short_of_partitions(await existing(await _raw(connection)))


def _sentence(difference: Any) -> str:
    first = difference[0] if isinstance(difference, list) else difference
    return " ".join(str(getattr(part, "fullname", None) or getattr(part, "name", None) or part) for part in first)


def _short_of_partitions(present: set[str]) -> list[str]:
    now = datetime.now(UTC)
    needed = {partition_name(table, month) for table in PARTITIONED for month in months_between(now, now + _WARN_AHEAD)}
    missing = sorted(needed - present)
    if not missing:
        return []
    return [f"Partitions needed within 48 hours are missing: {', '.join(missing)}. Run `overtone db upgrade`."]
