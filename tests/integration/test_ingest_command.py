"""`overtone ingest gaps` and `overtone ingest rules`, against a database and the simulator."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner, Result

from ingest.posts import Generator
from ingest.simulator import Simulator, SimulatorOptions
from overtone.cli.app import app
from overtone.db import Database
from overtone.db.posts import close_gap, open_gap
from overtone.errors import ConfigurationError, NotFoundError, StreamFatalError
from overtone.schema import datetime_to_snowflake

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(app, ["ingest", *words], standalone_mode=False)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """One on a thread of its own, because commands bring their own event loop."""
    made = Simulator(SimulatorOptions(), Generator())
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), list[int]()
    runner = web.AppRunner(made.application(), shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    monkeypatch.setenv("X_API_BASE_URL", f"http://127.0.0.1:{ports[0]}")
    monkeypatch.setenv("TWITTER_BEARER_TOKEN", "t")
    yield made
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def loaded(result: Result) -> Any:
    assert result.exception is None, result.output
    return json.loads(result.stdout)


def test_gaps_are_shown_with_what_became_of_them(
    run: Run, fresh_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", fresh_postgres_url)
    start = datetime(2026, 5, 1, tzinfo=UTC)

    async def fill() -> None:
        db = await Database.open(fresh_postgres_url, max_size=1)
        end = datetime_to_snowflake(start + timedelta(seconds=90))
        for hours, state, found in ((1, "repaired", 7), (2, "unrepairable", 3), (3, "unrepairable", 0)):
            gap = await open_gap(db, "s", "stall", started_at=start - timedelta(hours=hours))
            await close_gap(db, gap, state=state, before_post_id=end, repaired_posts=found)  # type: ignore[arg-type]
        await open_gap(db, "s", "reset", started_at=start)
        await db.close()

    asyncio.run(fill())
    shown = loaded(run("gaps", "--json"))
    assert [one["outcome"] for one in shown] == ["not over", "repaired", "partly repaired", "not repaired"]
    assert (shown[0]["seconds"], shown[1]["seconds"], shown[1]["repaired_posts"]) == (None, 3_690.0, 7)
    assert len(loaded(run("gaps", "--unrepaired", "--json"))) == 3
    assert loaded(run("gaps", "--stream", "other", "--json")) == []
    assert "partly" in run("gaps").stdout


def test_rules_are_made_as_the_options_say(run: Run, simulator: Simulator, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text('rules:\n  - {tag: cats, value: "cats lang:en"}\n  - {tag: dogs, value: dogs}\n')
    assert loaded(run("rules", "list", "--ingest", str(file), "--json")) == {"rules": [], "missing": ["cats", "dogs"]}
    tried = loaded(run("rules", "sync", "--ingest", str(file), "--dry-run", "--json"))
    assert (tried["added"], simulator.rulebook.rules) == (["cats", "dogs"], ())
    loaded(run("rules", "sync", "--ingest", str(file), "--json"))
    loaded(run("rules", "add", "cats", "kittens", "--json"))
    loaded(run("rules", "add", "other", "other", "--json"))
    listed = loaded(run("rules", "list", "--ingest", str(file), "--json"))["rules"]
    assert {one["tag"]: one["options"] for one in listed} == {"cats": "differs", "dogs": "same", "other": "not there"}
    assert "differs" in run("rules", "list", "--ingest", str(file)).stdout
    kept = loaded(run("rules", "sync", "--ingest", str(file), "--json"))
    assert (kept["added"], len(kept["deleted"])) == (["cats"], 1)
    loaded(run("rules", "sync", "--ingest", str(file), "--prune", "--json"))
    assert {(rule.tag, rule.value) for rule in simulator.rulebook.rules} == {("cats", "cats lang:en"), ("dogs", "dogs")}


def test_a_rule_is_removed_by_tag_or_id(run: Run, simulator: Simulator) -> None:
    loaded(run("rules", "add", "cats", "cats", "--json"))
    loaded(run("rules", "add", "dogs", "dogs", "--json"))
    loaded(run("rules", "remove", "cats", "--dry-run", "--json"))
    assert len(simulator.rulebook.rules) == 2
    loaded(run("rules", "remove", "cats", "--json"))
    loaded(run("rules", "remove", simulator.rulebook.rules[0].rule_id, "--json"))
    assert not simulator.rulebook.rules
    assert isinstance(run("rules", "remove", "cats").exception, NotFoundError)


def test_a_rule_that_x_refuses_says_why(run: Run, simulator: Simulator) -> None:
    assert isinstance(run("rules", "add", "bad", '"half', "--dry-run").exception, StreamFatalError)


def test_rules_need_a_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWITTER_BEARER_TOKEN", raising=False)
    assert isinstance(run("rules", "list").exception, ConfigurationError)
