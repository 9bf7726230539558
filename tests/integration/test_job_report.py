"""Reports as a job: the right figures of the right days, nothing that names anyone, and no end of waiting."""

import asyncio
import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from job_world import World
from overtone.db import Database, jobs
from overtone.db.erasure import erase_posts
from overtone.db.feedback import Feedback, write_feedback
from overtone.db.gaps import close_gap, open_gap, settle_gap
from overtone.db.jobs import Holders, NewJob
from overtone.db.keys import create_key
from overtone.db.posts import write_dead_letter, write_posts
from overtone.db.predictions import write_predictions
from overtone.db.queries import query
from overtone.db.report import make_report
from overtone.db.tombstones import bury_authors
from overtone.errors import DatabaseUnavailableError, InvalidInputError
from overtone.schema import Post, Prediction, datetime_to_snowflake
from overtone.settings import environment_for, load_settings
from serve.chores import Chores

ROOT = Path(__file__).parents[2]
NOW = datetime.now(UTC)
AUTHOR = 987_654_321
_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def post(number: int) -> Post:
    # Made long ago, by a backfill: what counts is when it was stored.
    instant = NOW - timedelta(days=40, seconds=number)
    return Post(datetime_to_snowflake(instant), AUTHOR, f"hush-hush {number}", instant)


def prediction(label: str, confidence: float, version: str) -> Prediction:
    rest = (1 - confidence) / 2
    scores = dict.fromkeys(("negative", "neutral", "positive"), rest) | {label: confidence}
    return Prediction(label, confidence, scores, version)


async def age(db: Database, table: str, *columns: str, where: str = "true", days: int = 10) -> None:
    moved = ", ".join(f"{column} = {column} - interval '{days} days'" for column in columns)
    async with db.acquire() as connection:
        await connection.execute(f"UPDATE overtone.{table} SET {moved} WHERE {where}")


async def fill(db: Database) -> None:
    """Rows of each kind: some within the last days and, in each table, one that is older."""
    posts = [post(number) for number in range(8)]
    ids = [one.post_id for one in posts]
    await write_posts(db, posts, stream="s")
    await write_predictions(db, [(ids[0], prediction("negative", 0.9, "old-1"))])
    await age(db, "posts", "stored_at", where=f"post_id IN ({ids[0]}, {ids[1]})")
    await age(db, "predictions", "stored_at")
    first, second = [("positive", 0.95), ("positive", 0.59), ("neutral", 0.76)], [("negative", 0.5), ("neutral", 0.6)]
    rows = [*((*one, "new-1") for one in first), *((*one, "new-2") for one in second)]
    await write_predictions(db, [(ids[place], prediction(*row)) for place, row in enumerate(rows)])

    said = [
        Feedback("positive", post_id=ids[0]),
        Feedback("negative", post_id=ids[1]),
        Feedback("neutral", text="hush"),
    ]
    await write_feedback(db, [Feedback("neutral", post_id=ids[2])], key_id="k")
    await age(db, "feedback", "created_at")
    await write_feedback(db, said, key_id="k")

    over = await open_gap(db, "s", "x", started_at=NOW - timedelta(days=30))
    await close_gap(db, over)
    await age(db, "stream_gaps", "ended_at")
    mended = await open_gap(db, "s", "x", started_at=NOW - timedelta(hours=2))
    await close_gap(db, mended)
    await settle_gap(db, mended, "repaired", repaired_posts=3)
    async with db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.stream_gaps SET ended_at = $1 WHERE id = $2", NOW - timedelta(hours=1), mended
        )
    await open_gap(db, "s", "x", started_at=NOW - timedelta(days=20))

    await write_dead_letter(db, b"hush-1", "broken")
    await age(db, "dead_letters", "first_seen_at", "last_seen_at")
    await write_dead_letter(db, b"hush-2", "broken")

    for state in ("failed", "cancelled", "cancelled"):
        made, _ = await jobs.create_job(db, NewJob(uuid4(), "score", "k", {}, [1]))
        await jobs.end_job(db, made.job_id, state)  # type: ignore[arg-type]
    await age(db, "jobs", "created_at", where="state = 'failed'")

    await erase_posts(db, [ids[6]], reason="requested")
    await age(db, "deleted_posts", "deleted_at")
    await erase_posts(db, [ids[7]], reason="requested")
    await bury_authors(db, [AUTHOR + 1, AUTHOR + 2], reason="requested")


async def test_the_figures_are_those_of_the_days(fresh_database: Database) -> None:
    await fill(fresh_database)
    report = await make_report(fresh_database, days=7)
    since, until = (datetime.fromisoformat(report.pop(name)) for name in ("since", "until"))
    assert until - since == timedelta(days=7)
    # The gap that is still open counts from the beginning of the days.
    assert report["gaps"].pop("seconds") == pytest.approx(7 * 86_400 + 3600, abs=1.0)
    assert report == {
        "days": 7,
        "posts": {"stored": 4},
        "predictions": {
            "stored": 5,
            "labels": {"neutral": 2, "positive": 2, "negative": 1},
            "mean_confidence": 0.68,
            "unsure": 0.4,
            "unsure_below": 0.6,
            "versions": [
                {
                    "model_version": "new-1",
                    "stored": 3,
                    "labels": {"neutral": 1, "positive": 2},
                    "mean_confidence": 0.7667,
                    "unsure": 0.3333,
                },
                {
                    "model_version": "new-2",
                    "stored": 2,
                    "labels": {"negative": 1, "neutral": 1},
                    "mean_confidence": 0.55,
                    "unsure": 0.5,
                },
            ],
        },
        "feedback": {
            "given": 3,
            "compared": 2,
            "agreement": 0.5,
            "versions": [{"model_version": "new-1", "given": 2, "compared": 2, "agreement": 0.5}],
        },
        "gaps": {"states": {"open": 1, "repaired": 1}, "repaired_posts": 3},
        "dead_letters": {"new": 1, "waiting": 2},
        "jobs": {"cancelled": 2},
        "erasures": {"posts": 1, "authors": 2},
    }
    longer = await make_report(fresh_database, days=30)
    assert (longer["posts"]["stored"], longer["predictions"]["stored"]) == (6, 6)
    assert longer["feedback"] == {
        "given": 4,
        "compared": 3,
        "agreement": pytest.approx(2 / 3, abs=1e-4),
        "versions": [
            {"model_version": "new-1", "given": 3, "compared": 3, "agreement": pytest.approx(2 / 3, abs=1e-4)}
        ],
    }
    assert (longer["gaps"]["states"]["closed"], longer["dead_letters"]["new"]) == (1, 2)
    assert (longer["jobs"], longer["erasures"]) == ({"cancelled": 2, "failed": 1}, {"posts": 2, "authors": 2})


async def test_of_nothing_there_are_no_means(fresh_database: Database) -> None:
    report = await make_report(fresh_database, days=1)
    assert (report["posts"]["stored"], report["jobs"], report["gaps"]) == (
        0,
        {},
        {"states": {}, "seconds": 0, "repaired_posts": 0},
    )
    assert (report["predictions"]["mean_confidence"], report["feedback"]["agreement"]) == (None, None)


async def test_a_report_names_nobody_and_repeats_nothing(fresh_database: Database) -> None:
    await fill(fresh_database)
    written = json.dumps(await make_report(fresh_database, days=90))
    assert "hush" not in written
    assert not any(
        str(number) in written for number in (AUTHOR, AUTHOR + 1, *(post(number).post_id for number in range(8)))
    )


async def test_a_report_that_takes_too_long_is_given_up(fresh_database: Database) -> None:
    async with fresh_database.transaction() as other:
        await other.execute("LOCK TABLE overtone.predictions IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(InvalidInputError, match=r"A report of 9 days .* ask for fewer days"):
            await make_report(fresh_database, days=9, patience_s=0.3)
        reporting = asyncio.create_task(make_report(fresh_database, days=9))
        await until_someone_waits(other)
        # An administrator who ends the statement says nothing of the days: it is tried again.
        await other.execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        with pytest.raises(DatabaseUnavailableError):
            await reporting
    assert (await make_report(fresh_database, days=9))["days"] == 9


async def until_someone_waits(connection: Any) -> None:
    async with asyncio.timeout(30):
        while not await connection.fetchval(_WAITING):  # noqa: ASYNC110  (PostgreSQL tells nobody)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "more", "index"),
    [("report_posts", (), "stored_at_idx"), ("report_predictions", (0.6,), "stored_at_idx")],
)
async def test_only_the_blocks_of_the_days_are_read(
    fresh_database: Database, name: str, more: tuple[float, ...], index: str
) -> None:
    await fill(fresh_database)
    async with fresh_database.transaction() as connection:
        # Tables as small as these are read whole otherwise.
        await connection.execute("SET LOCAL enable_seqscan = off")
        plan = await connection.fetch(f"EXPLAIN {query(name)}", NOW - timedelta(days=7), NOW, *more)
    lines = [row[0] for row in plan]
    assert not any("Seq Scan" in line for line in lines)
    assert sum("Bitmap Index Scan" in line and index in line for line in lines) >= 2


async def test_a_report_is_a_job_of_administrators(world: World, fresh_postgres_url: str, tmp_path: Path) -> None:
    settings = load_settings(database_url=fresh_postgres_url, overtone_home=tmp_path / "home", jobs_folder=world.root)
    _, secret = await create_key(world.db, "chief", ["admin"])
    key = {"x-api-key": secret}
    assert (await world.client.post("/jobs/report")).status_code == 403
    for days in (0, 91, "7", 1.0, False):
        wrong = await world.client.post("/jobs/report", json={"days": days}, headers=key)
        assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "days")
    asked: list[dict[str, Any]] = [{}, {"json": {}}, {"json": {"days": 30}}]
    made = [(await world.client.post("/jobs/report", headers=key, **one)).json() for one in asked]
    assert {(job["kind"], job["state"], job["total"]) for job in made} == {("report", "queued", 1)}
    assert await world.dispatcher.step() == 3
    chores = Chores(settings, world.db, Holders())
    for name in list(world.queue.chores) * 2:
        await chores.do(name)
    seen = [(await world.client.get(f"/jobs/{job['job_id']}", headers=key)).json() for job in made]
    assert [job["outcome"]["days"] for job in seen] == [7, 7, 30]
    assert {(job["state"], job["done"], job["progress"]) for job in seen} == {("succeeded", 1, 1.0)}
    # The report that is being made is one of the jobs.
    assert sorted(sum(job["outcome"]["jobs"].values()) for job in seen) == [3, 3, 3]


async def test_too_many_days_end_the_job_at_once(
    world: World, fresh_postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(database_url=fresh_postgres_url, overtone_home=tmp_path / "home")
    _, secret = await create_key(world.db, "chief", ["admin"])
    job = (await world.client.post("/jobs/report", headers={"x-api-key": secret})).json()
    await world.dispatcher.step()

    async def slow(*_: Any, days: int) -> None:
        raise InvalidInputError(f"A report of {days} days takes longer than 120 s here: ask for fewer days.")

    monkeypatch.setattr("serve.chores.make_report", slow)
    with pytest.raises(InvalidInputError):
        await Chores(settings, world.db, Holders()).do(world.queue.chores[0])
    failed = (await world.client.get(f"/jobs/{job['job_id']}", headers={"x-api-key": secret})).json()
    assert (failed["state"], "fewer days" in failed["error"]) == ("failed", True)


async def command(world: World, home: Path, secret: str, *arguments: str) -> tuple[int, str]:
    """The exit code of `overtone jobs` with these arguments, and what it says, while a consumer works."""
    settings = load_settings(overtone_home=home, api_key_header="X-API-Key")
    port = str(world.client.base_url.port)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "overtone.cli", "jobs", *arguments),
        env=environment_for(
            settings, API_PORT=port, OVERTONE_API_KEY=secret, HOME=str(home), PATH=os.environ["PATH"], COLUMNS="160"
        ),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    consumer = Chores(settings, world.db, Holders())
    said = asyncio.create_task(process.communicate())
    try:
        while not said.done():
            await world.dispatcher.step()
            while world.queue.tasks:
                await world.scorer.score(world.queue.tasks.popleft())
            while world.queue.chores:
                await consumer.do(world.queue.chores.popleft())
            await asyncio.wait([said], timeout=0.05)
    finally:
        if process.returncode is None:
            process.kill()
    output, _ = await said
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_commands_wait_and_show_what_came_of_it(world: World, tmp_path: Path) -> None:
    await fill(world.db)
    _, secret = await create_key(world.db, "chief", ["admin"])
    code, said = await command(world, tmp_path, secret, "rescore", "--wait", "--json")
    rescored = json.loads(said)
    assert (code, rescored["state"], rescored["done"], rescored["outcome"]["written"]) == (0, "succeeded", 6, 6)
    code, said = await command(world, tmp_path, secret, "status", rescored["job_id"])
    assert (code, "succeeded, 6 of 6 posts done, 0 with an error; 6 predictions by" in said) == (0, True)
    code, said = await command(world, tmp_path, secret, "report")
    lines = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in said.splitlines()[1:])
    assert code == 0, said
    assert lines["posts stored"] == "4"
    assert lines["feedback"] == "3 given, 50.0% of 2 agree with the prediction"
    assert lines["new-2"] == "2 (1 negative, 1 neutral), mean confidence 0.550, 50.0% below 0.6"
    assert lines["dead letters"] == "1 new, 2 waiting"
    code, said = await command(world, tmp_path, secret, "report", "--days", "30", "--json")
    assert (code, json.loads(said)["outcome"]["posts"]) == (0, {"stored": 6})
    code, said = await command(world, tmp_path, secret, "report", "--no-wait")
    assert (code, "report queued." in said) == (0, True)
    code, said = await command(world, tmp_path, secret, "list")
    assert (code, said.count(" report "), said.count(" rescore ")) == (0, 3, 1)
    code, _ = await command(world, tmp_path, secret, "report", "--days", "91")
    assert code == 2
    code, said = await command(world, tmp_path, world.secret, "report")
    assert (code, "admin" in said) == (4, True)
