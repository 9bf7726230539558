"""The migrations and the tables say the same."""

import asyncio

import asyncpg
import pytest
from alembic import command
from sqlalchemy import Connection

from overtone.db.migrate import _connected, alembic_config, check, upgrade
from overtone.errors import ConfigurationError


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statement)
    await connection.close()


async def test_an_upgraded_database_has_no_drift(postgres_url: str) -> None:
    assert await asyncio.to_thread(check, postgres_url) == []


async def test_an_empty_database_is_told_to_upgrade(empty_postgres_url: str) -> None:
    [problem] = await asyncio.to_thread(check, empty_postgres_url)
    assert "overtone db upgrade" in problem


async def test_starters_at_once_upgrade_once(empty_postgres_url: str) -> None:
    await asyncio.gather(*(upgrade(empty_postgres_url) for _ in range(3)))
    assert await asyncio.to_thread(check, empty_postgres_url) == []


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("ALTER TABLE overtone.jobs ADD COLUMN extra int", "extra"),
        ("ALTER TABLE overtone.jobs DROP COLUMN total", "total"),
        ("ALTER TABLE overtone.posts ALTER lang TYPE varchar(5)", "lang"),
        ("CREATE TABLE overtone.stray (a int)", "stray"),
        ("DROP INDEX overtone.ix_posts_author_id", "ix_posts_author_id"),
        ("DROP TABLE overtone.feedback", "feedback"),
        ("DELETE FROM overtone.alembic_version", "overtone db upgrade"),
    ],
)
async def test_drift_either_way_is_told(fresh_postgres_url: str, statement: str, told: str) -> None:
    await execute(fresh_postgres_url, statement)
    problems = await asyncio.to_thread(check, fresh_postgres_url)
    assert problems
    assert all(told in problem for problem in problems)


async def test_missing_partitions_are_told(fresh_postgres_url: str) -> None:
    await execute(
        fresh_postgres_url,
        "DO $$ DECLARE part text; BEGIN FOR part IN SELECT inhrelid::regclass FROM pg_inherits"
        " JOIN pg_class p ON p.oid = inhparent WHERE p.relname = 'posts' AND p.relkind = 'p'"
        " LOOP EXECUTE 'DROP TABLE ' || part; END LOOP; END $$",
    )
    [problem] = await asyncio.to_thread(check, fresh_postgres_url)
    assert "Partitions" in problem
    await upgrade(fresh_postgres_url)
    assert await asyncio.to_thread(check, fresh_postgres_url) == []


async def test_a_database_from_a_later_version_is_refused(fresh_postgres_url: str) -> None:
    await execute(fresh_postgres_url, "UPDATE overtone.alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="9999"):
        await upgrade(fresh_postgres_url)


async def test_a_downgrade_takes_everything_away(fresh_postgres_url: str) -> None:
    def downgrade(connection: Connection) -> None:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")

    async with _connected(fresh_postgres_url) as connection, connection.begin():
        await connection.run_sync(downgrade)
    await upgrade(fresh_postgres_url)
    assert await asyncio.to_thread(check, fresh_postgres_url) == []


async def test_wrong_credentials_and_databases_are_configuration_errors(postgres_url: str) -> None:
    for wrong in (
        postgres_url.replace("overtone@", "nobody:secret@"),
        postgres_url.replace("@/", "@/no_such_"),
        f"{postgres_url}&no_such_setting=1",
    ):
        with pytest.raises(ConfigurationError) as caught:
            await upgrade(wrong)
        assert "secret" not in str(caught.value)
