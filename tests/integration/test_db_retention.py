"""Retention in a real database: old months go, archived if asked, and nothing else does."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ingest.options import RetentionOptions
from ingest.retention import RetentionKeeper
from overtone.archive import ParquetArchive
from overtone.db import Database
from overtone.db.erasure import erase_posts
from overtone.db.posts import write_dead_letter, write_posts
from overtone.db.predictions import write_predictions
from overtone.db.retention import Limits, expired, plan_retention, retain
from overtone.erasure_files import erase_from_folder
from overtone.errors import ConfigurationError
from overtone.schema import Post, Prediction, datetime_to_snowflake
from overtone.settings import load_settings

NOW = datetime.now(UTC)
OLD = datetime_to_snowflake(datetime(2020, 1, 10, tzinfo=UTC))
NEW = datetime_to_snowflake(NOW - timedelta(hours=1))
LIMITS = Limits(posts=6, predictions=12)


async def fill(db: Database) -> None:
    posts = [Post(number, 7, "text", NOW, rule_tags=("a", "b"), payload={"n": 1}) for number in (OLD, OLD + 1, NEW)]
    await write_posts(db, posts, stream="s")
    scores = {"positive": 0.75, "negative": 0.25}
    await write_predictions(db, [(one.post_id, Prediction("positive", 0.75, scores, "m")) for one in posts])


async def ids(db: Database, table: str) -> list[Any]:
    async with db.acquire() as connection:
        return [row[0] for row in await connection.fetch(f"SELECT post_id FROM overtone.{table} ORDER BY post_id")]


def test_a_month_expires_when_its_limit_is_over() -> None:
    names = {"posts_2026_05", "posts_2026_04", "predictions_2025_11", "predictions_2025_10", "posts_2026_11"}
    now = datetime(2026, 11, 24, tzinfo=UTC)
    assert expired(names, LIMITS, now) == ["posts_2026_04", "predictions_2025_10"]
    assert expired(names, Limits(0, 0), now) == []


async def test_a_dry_run_changes_nothing(fresh_database: Database) -> None:
    await fill(fresh_database)
    report = await plan_retention(fresh_database, LIMITS, NOW)
    assert report.dropped == ["posts_2020_01", "predictions_2020_01"]
    assert await ids(fresh_database, "posts") == [OLD, OLD + 1, NEW]


async def test_old_months_are_archived_and_dropped(fresh_database: Database, tmp_path: Path) -> None:
    await fill(fresh_database)
    await write_dead_letter(fresh_database, b"kept", "x")
    report = await retain(fresh_database, LIMITS, ParquetArchive(str(tmp_path / "archive")).keep)
    assert report.dropped == ["posts_2020_01", "predictions_2020_01"]
    assert report.archived_rows == {"posts_2020_01": 2, "predictions_2020_01": 2}
    assert await ids(fresh_database, "posts") == await ids(fresh_database, "predictions") == [NEW]
    rows = pq.read_table(tmp_path / "archive" / "posts_2020_01.parquet").to_pylist()
    assert [row["post_id"] for row in rows] == [OLD, OLD + 1]
    assert (rows[0]["author_id"], rows[0]["rule_tags"], rows[0]["payload"]) == (7, ["a", "b"], '{"n": 1}')
    assert erase_from_folder(tmp_path / "archive", [OLD]) == 2
    again = await retain(fresh_database, LIMITS)
    assert (again.dropped, again.made, again.dead_letters) == ([], [], 0)


async def test_what_is_erased_while_it_is_archived_is_in_no_archive(fresh_database: Database, tmp_path: Path) -> None:
    await fill(fresh_database)
    archive, erased = ParquetArchive(str(tmp_path)), False

    async def keep(name: str, rows: Any) -> int:
        nonlocal erased
        count = await archive.keep(name, rows)
        if not erased:
            erased = True
            await erase_posts(fresh_database, [OLD], reason="x")
        return count

    report = await retain(fresh_database, LIMITS, keep)
    assert report.archived_rows == {"posts_2020_01": 1, "predictions_2020_01": 1}
    for name in report.archived_rows:
        assert pq.read_table(tmp_path / f"{name}.parquet")["post_id"].to_pylist() == [OLD + 1]


async def test_an_archive_that_fails_loses_nothing(fresh_database: Database) -> None:
    await fill(fresh_database)

    async def fail(name: str, rows: Any) -> int:
        await anext(rows)
        await rows.aclose()
        raise OSError("disk full")

    with pytest.raises(Exception, match="disk full"):
        await retain(fresh_database, LIMITS, fail)
    # It is detached by now: the next run finds it and goes on.
    report = await retain(fresh_database, LIMITS)
    assert report.dropped == ["posts_2020_01", "predictions_2020_01"]


def test_an_archive_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ARCHIVE_URL"):
        ParquetArchive("nowhere://x")


async def test_the_leader_keeps_to_the_limits_beside_the_stream(fresh_database: Database, tmp_path: Path) -> None:
    await fill(fresh_database)
    settings = load_settings(archive_url=str(tmp_path / "archive"))
    options = RetentionOptions(every_s=3_600, first_after_s=0.01)
    task = asyncio.create_task(RetentionKeeper(fresh_database, settings, options).run())
    async with asyncio.timeout(30):
        while await ids(fresh_database, "posts") != [NEW]:  # noqa: ASYNC110  the database is what changes
            await asyncio.sleep(0.05)
    assert (tmp_path / "archive" / "posts_2020_01.parquet").is_file()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_archive_that_cannot_be_used_drops_nothing(fresh_database: Database) -> None:
    await fill(fresh_database)
    keeper = RetentionKeeper(fresh_database, load_settings(archive_url="nosuch://x"), RetentionOptions())
    assert not await keeper.keep()
    assert await ids(fresh_database, "posts") == [OLD, OLD + 1, NEW]
