"""`overtone ingest gaps|accept-gaps` and `overtone rules`, against a database and the simulator."""

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
from overtone.db.gaps import close_gap, open_gap, settle_gap
from overtone.db.posts import write_posts
from overtone.errors import ConfigurationError, NotFoundError, StreamFatalError
from overtone.schema import Post, datetime_to_snowflake

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(app, words, standalone_mode=False)


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
        endings: list[tuple[Any, int, Any, str | None]] = [
            ("repaired", 7, "replay", None),
            ("partly_repaired", 3, "search", "search finds no retweets"),
            ("accepted", 0, "search", "search reaches back seven days"),
        ]
        for hours, (ending, found, means, reason) in enumerate(endings, start=1):
            gap = await open_gap(db, "s", "stall", started_at=start - timedelta(hours=hours))
            await close_gap(db, gap, before_post_id=end)
            await settle_gap(db, gap, ending, repaired_posts=found, means=means, reason=reason)
        await open_gap(db, "s", "reset", started_at=start)
        await db.close()

    asyncio.run(fill())
    shown = loaded(run("ingest", "gaps", "--json"))
    assert [one["outcome"] for one in shown] == ["not over", "repaired", "partly repaired", "accepted"]
    assert [one["means"] for one in shown] == [None, "replay", "search", "search"]
    assert [bool(one["reason"]) for one in shown] == [False, False, True, True]
    assert (shown[0]["seconds"], shown[1]["seconds"], shown[1]["repaired_posts"]) == (None, 3_690.0, 7)
    assert len(loaded(run("ingest", "gaps", "--unrepaired", "--json"))) == 3
    assert loaded(run("ingest", "gaps", "--stream", "other", "--json")) == []
    assert "partly" in run("ingest", "gaps").stdout
    numbers = [str(one["id"]) for one in shown]
    assert loaded(run("ingest", "accept-gaps", *numbers, "--reason", "a test", "--json")) == {
        "accepted": [shown[2]["id"]],
        "left": sorted(one["id"] for one in shown if one is not shown[2]),
    }
    assert loaded(run("ingest", "gaps", "--json"))[2]["reason"] == "a test"
    assert isinstance(run("ingest", "accept-gaps", numbers[0], "--reason", "x").exception, NotFoundError)


def test_rules_are_made_as_the_options_say(run: Run, simulator: Simulator, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text('rules:\n  - {tag: cats, value: "cats lang:en"}\n  - {tag: dogs, value: dogs}\n')
    assert loaded(run("rules", "list", "--ingest", str(file), "--json")) == {"rules": [], "missing": ["cats", "dogs"]}
    tried = loaded(run("rules", "apply", "--ingest", str(file), "--dry-run", "--json"))
    assert (tried["added"], simulator.rulebook.rules) == (["cats", "dogs"], ())
    loaded(run("rules", "apply", "--ingest", str(file), "--json"))
    loaded(run("rules", "add", "cats", "kittens", "--json"))
    loaded(run("rules", "add", "other", "other", "--json"))
    listed = loaded(run("rules", "list", "--ingest", str(file), "--json"))["rules"]
    assert {one["tag"]: one["options"] for one in listed} == {"cats": "differs", "dogs": "same", "other": "not there"}
    assert "differs" in run("rules", "list", "--ingest", str(file)).stdout
    kept = loaded(run("rules", "apply", "--ingest", str(file), "--json"))
    assert (kept["added"], len(kept["deleted"])) == (["cats"], 1)
    loaded(run("rules", "apply", "--ingest", str(file), "--prune", "--json"))
    assert {(rule.tag, rule.value) for rule in simulator.rulebook.rules} == {("cats", "cats lang:en"), ("dogs", "dogs")}


def test_what_apply_would_change_is_shown(run: Run, simulator: Simulator, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - {tag: cats, value: cats}\n  - {tag: dogs, value: dogs}\n")
    for tag, value in (("cats", "kittens"), ("other", "other")):
        loaded(run("rules", "add", tag, value, "--json"))
    shown = run("rules", "diff", "--ingest", str(file), "--exit-code")
    assert (shown.return_value, shown.stdout.splitlines()) == (
        1,
        ["- cats: kittens", "+ cats: cats", "+ dogs: dogs", "? other: other"],
    )
    assert len(loaded(run("rules", "diff", "--ingest", str(file), "--json"))) == 4
    loaded(run("rules", "apply", "--ingest", str(file), "--prune", "--json"))
    shown = run("rules", "diff", "--ingest", str(file), "--exit-code")
    assert (shown.return_value, "no others" in shown.stdout) == (0, True)


def test_rules_are_tried_before_they_cost_anything(
    run: Run, simulator: Simulator, fresh_postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", fresh_postgres_url)
    options = ("--rule", "cat", "--rule", "(cat", "--json")
    tried = run("rules", "test", "--text", "my cat", "--text", "my dog", *options)
    assert tried.return_value == 1
    good, bad = loaded(tried)
    assert (good["matched"], good["of"], good["refused"]) == (1, 2, None)
    assert (bad["matched"], "pairs" in bad["refused"], "bracket" in bad["note"]) == (None, True, True)
    assert not simulator.rulebook.rules
    file = tmp_path / "posts.jsonl"
    file.write_text('"a cat"\n"two cats"\n"cat and cat"\n')
    [one] = loaded(run("rules", "test", "--rule", "cat", "--posts", str(file), "--offline", "--json"))
    assert (one["matched"], one["of"]) == (2, 3)

    async def fill() -> None:
        db = await Database.open(fresh_postgres_url, max_size=1)
        now = datetime.now(UTC)
        first = datetime_to_snowflake(now - timedelta(minutes=1))
        posts = [
            Post(first + number, 7, text, now, payload={"data": {"author_id": "7", "lang": lang}})
            for number, (text, lang) in enumerate([("a cat", "en"), ("a cat", "de"), ("a dog", "en")])
        ]
        await write_posts(db, posts, stream="s")
        await db.close()

    asyncio.run(fill())
    [one] = loaded(run("rules", "test", "--rule", "cat lang:en", "--json"))
    assert (one["matched"], one["of"]) == (1, 3)
    assert "1 of 3" in run("rules", "test", "--rule", "cat lang:en").stdout


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
