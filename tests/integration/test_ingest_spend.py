"""The meter of posts read: counted through restarts, and a gate that closes before the cap."""

import asyncio
import json
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ingest.options import SpendOptions
from ingest.spend import SpendMeter
from overtone.cli.app import app
from overtone.db import Database
from overtone.db.usage import usage_since

OPTIONS = SpendOptions(monthly_posts=1_000, stop_at=0.9, post_usd=0.005)


class Calendar:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 6, 30, 23, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


async def test_the_gate_closes_before_the_cap_and_opens_in_the_next_period(fresh_database: Database) -> None:
    calendar = Calendar()
    meter = SpendMeter(fresh_database, "posts", OPTIONS, clock=calendar)
    meter.count(899)
    await meter.write()
    assert meter.is_open
    meter.count(1)
    await asyncio.wait_for(meter.until_closed(), 5)
    await meter.write()
    assert not meter.is_open
    calendar.now = datetime(2026, 7, 1, tzinfo=UTC)
    await meter.write()
    await asyncio.wait_for(meter.until_open(), 5)
    assert meter.used == 0


async def test_counts_outlive_the_process_and_add_up(fresh_database: Database) -> None:
    calendar = Calendar()
    for _ in range(2):
        meter = SpendMeter(fresh_database, "posts", OPTIONS, clock=calendar)
        meter.count(450)
        await meter.write()
    assert (meter.used, meter.is_open) == (900, False)
    (row,) = await usage_since(fresh_database, date(2026, 6, 1))
    assert (row.day, row.count, float(row.cost_usd)) == (date(2026, 6, 30), 900, 4.5)


async def test_the_greater_count_and_the_cap_of_x_are_believed(fresh_database: Database) -> None:
    options = OPTIONS.model_copy(update={"monthly_posts": None})
    meter = SpendMeter(fresh_database, "posts", options, clock=Calendar())
    meter.count(10_000)
    assert meter.is_open
    answered = asyncio.Event()

    async def ask_x() -> tuple[int, int | None]:
        answered.set()
        return 19_500, 20_000

    task = asyncio.create_task(meter.run(ask_x))
    await asyncio.wait_for(meter.until_closed(), 10)
    assert (meter.used, meter.cap, answered.is_set()) == (19_500, 20_000, True)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_the_command_shows_the_month(monkeypatch: pytest.MonkeyPatch, fresh_postgres_url: str, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABASE_URL", fresh_postgres_url)
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path))

    async def fill() -> None:
        db = await Database.open(fresh_postgres_url, max_size=1)
        meter = SpendMeter(db, "posts", OPTIONS)
        meter.count(200)
        await meter.write()
        await db.close()

    asyncio.run(fill())
    shown = json.loads(CliRunner().invoke(app, ["ingest", "spend", "--json"], standalone_mode=False).stdout)
    assert (shown["resource"], shown["today"], shown["used"]) == ("posts", 200, 200)
    assert float(shown["cost_usd"]) == 1.0
    assert shown["projected"] >= 200
    assert "200 today" in CliRunner().invoke(app, ["ingest", "spend"], standalone_mode=False).stdout
