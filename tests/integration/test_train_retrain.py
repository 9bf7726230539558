"""`overtone retrain` on a real database: one run, however many ask, and what becomes of it."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from overtone.db import Database
from overtone.db.feedback import Feedback, write_feedback
from overtone.db.posts import write_posts
from overtone.db.predictions import write_predictions
from overtone.db.retrain import Run, claim_run, history
from overtone.erasure import open_eraser
from overtone.errors import UnavailableError
from overtone.schema import LABELS, Post, Prediction, datetime_to_snowflake
from overtone.settings import Settings, environment_for, load_settings
from train.retrain import Decision, JobNeeds, Order, check
from train.submission import RayJobs

ROOT = Path(__file__).parents[2]
OPTIONS = ("--config", "run.yaml", "--validation", "validation.tsv")
ORDER = Order(OPTIONS)


class JobServer(ThreadingHTTPServer):
    """Answers as Ray's job server does: an id is taken once. Nothing is run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.is_broken = False
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def end(self, state: str) -> None:
        for job in self.jobs.values():
            job["status"] = state

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"})
            return
        job = self.server.jobs.get(self.path.removeprefix("/api/jobs/"))
        if job is None:
            self._answer(404, f"Job {self.path} does not exist")
        else:
            self._answer(200, job)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["submission_id"]
        with self.server.lock:
            if self.server.is_broken:
                self._answer(500, "No available agent to submit job, please try again later.")
            elif name in self.server.jobs:
                self._answer(500, f"Job with submission_id {name} already exists.")
            else:
                kept = {"type": "SUBMISSION", "submission_id": name, "status": "RUNNING", "asked": asked}
                self.server.jobs[name] = kept | {"entrypoint": asked["entrypoint"]}
                self._answer(200, {"job_id": name, "submission_id": name})

    def _answer(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    server = JobServer()
    yield server
    server.stop()


@pytest.fixture
def settings(fresh_postgres_url: str, tmp_path: Path) -> Settings:
    return load_settings(
        overtone_home=tmp_path,
        database_url=fresh_postgres_url,
        min_samples_for_retrain=300,
        retrain_interval_hours=48,
        allow_training_on_x_content=True,
    )


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    assert settings.database_url is not None
    opened = await Database.open(settings.database_url.get_secret_value(), max_size=4)
    yield opened
    await opened.close()


async def say(db: Database, rows: int, first: int = 0) -> None:
    items = [Feedback(LABELS[number % 3], text=f"text {number}") for number in range(first, first + rows)]
    await write_feedback(db, items, key_id="k")


async def execute(db: Database, statement: str) -> None:
    async with db.acquire() as connection:
        await connection.execute(statement)


async def stored(db: Database) -> list[tuple[str, Any]]:
    async with db.acquire() as connection:
        rows = await connection.fetch("SELECT outcome, state FROM overtone.retrain_decisions ORDER BY id")
    return [tuple(row) for row in rows]


def asks(settings: Settings, db: Database, jobs: JobServer) -> Callable[..., Any]:
    def ask(order: Order = ORDER) -> Any:
        return check(settings, db, order, lambda: RayJobs(jobs.url, JobNeeds()))

    return ask


async def test_labels_that_arrive_while_two_checks_fire_make_one_job(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    assert settings.database_url is not None
    environment = environment_for(
        settings,
        DATABASE_URL=settings.database_url.get_secret_value(),
        MIN_SAMPLES_FOR_RETRAIN="300",
        LOG_LEVEL="ERROR",
    )
    command = [sys.executable, "-m", "overtone.cli", "retrain", "--check", "--json", "--address", jobs.url]
    command += ["--", *OPTIONS]
    enough = asyncio.Event()

    async def arrive() -> None:
        for first in range(0, 1000, 10):
            await say(db, 10, first)
            if first >= 300:
                enough.set()
            await asyncio.sleep(0.02)

    def fire() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    arriving = asyncio.create_task(arrive())
    await enough.wait()
    both = await asyncio.gather(asyncio.to_thread(fire), asyncio.to_thread(fire))
    await arriving
    assert [one.returncode for one in both] == [0, 0], [one.stderr for one in both]
    outcomes = [json.loads(one.stdout)["outcome"] for one in both]
    assert sorted(outcomes) == ["busy", "submits"]
    third = json.loads((await asyncio.to_thread(fire)).stdout)
    assert (third["outcome"], third["run"]) == ("busy", next(iter(jobs.jobs)))
    [(name, job)] = jobs.jobs.items()
    assert re.fullmatch(r"retrain-\d{8}t\d{6}-\d{3}", name)
    bundle = settings.home / "bundles" / name
    assert job["entrypoint"] == (
        f"python -m train --config run.yaml --validation validation.tsv --run-name {name}"
        f" --output {bundle} --from-feedback"
    )
    assert await stored(db) == [("submits", "open")]


async def test_checks_at_once_within_one_process_make_one_job(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    await say(db, 1000)
    ask = asks(settings, db, jobs)
    found: list[Decision] = await asyncio.gather(*(ask() for _ in range(3)))
    assert sorted(one.outcome for one in found) == ["busy", "busy", "submits"]
    assert len(jobs.jobs) == 1


async def test_without_the_lock_the_tables_and_ray_let_one_run_through(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    runs = [Run(f"retrain-{number}", "python -m train", datetime.now(UTC), is_submitted=False) for number in range(3)]
    claims = await asyncio.gather(*(claim_run(db, run, {"reasons": []}, None) for run in runs))
    assert sorted(claims) == [False, False, True]
    server = RayJobs(jobs.url, JobNeeds(cpus=1.0, labels={"pool": "train-a100"}))
    for _ in range(2):
        server.submit("retrain-x", "true")
    [job] = jobs.jobs.values()
    assert job["asked"]["entrypoint_num_cpus"] == 1.0
    assert job["asked"]["entrypoint_label_selector"] == {"pool": "train-a100"}


async def test_a_run_that_was_written_down_and_not_submitted_is_submitted_by_the_next_check(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    await say(db, 300)
    ask = asks(settings, db, jobs)
    jobs.is_broken = True
    with pytest.raises(UnavailableError, match="No available agent"):
        await ask()
    left = (await history(db)).open_run
    assert left is not None
    assert not left.is_submitted
    jobs.is_broken = False
    again = await ask()
    assert (again.outcome, again.run) == ("busy", left.name)
    assert [(name, job["entrypoint"]) for name, job in jobs.jobs.items()] == [(left.name, left.entrypoint)]
    assert (await ask()).outcome == "busy"
    assert len(jobs.jobs) == 1


async def test_a_finished_run_has_learned_and_a_failed_one_has_not(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    await say(db, 300)
    ask = asks(settings, db, jobs)
    first = await ask()
    jobs.end("SUCCEEDED")
    await say(db, 10, 5000)
    waits = await ask()
    assert (waits.outcome, waits.criteria[0].value) == ("waits", 10)
    # A label that is changed is new again.
    await write_feedback(db, [Feedback("positive", text="text 1")], key_id="k")
    assert (await ask()).criteria[0].value == 11
    await say(db, 300, 6000)
    second = await ask()
    assert second.outcome == "submits"
    assert second.run != first.run
    jobs.end("FAILED")
    backs_off = await ask()
    assert (backs_off.outcome, backs_off.criteria[0].value) == ("waits", 311)
    assert "the last 1 runs failed" in backs_off.reasons[0]
    await execute(
        db, "UPDATE overtone.retrain_decisions SET ended_at = ended_at - interval '1 hour' WHERE state = 'failed'"
    )
    assert (await ask()).outcome == "submits"
    kept = await stored(db)
    assert [one for one in kept if one[0] == "submits"] == [
        ("submits", "succeeded"),
        ("submits", "failed"),
        ("submits", "open"),
    ]


async def test_a_job_that_the_server_has_lost_counts_as_failed(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    await say(db, 300)
    ask = asks(settings, db, jobs)
    await ask()
    jobs.jobs.clear()
    assert "the last 1 runs failed" in (await ask()).reasons[0]


async def test_a_dry_run_keeps_and_submits_nothing(settings: Settings, db: Database, jobs: JobServer) -> None:
    await say(db, 300)
    ask = asks(settings, db, jobs)
    found = await ask(Order(OPTIONS, is_dry_run=True))
    assert found.outcome == "submits"
    assert "--from-feedback" in found.entrypoint
    assert (await stored(db), jobs.jobs) == ([], {})


async def test_a_run_that_is_asked_for_needs_no_label(settings: Settings, db: Database, jobs: JobServer) -> None:
    ask = asks(settings, db, jobs)
    assert (await ask()).outcome == "waits"
    found = await ask(Order(OPTIONS, is_forced=True))
    assert found.outcome == "submits"
    assert "--from-feedback" not in found.entrypoint
    assert (await ask(Order(OPTIONS, is_forced=True))).outcome == "busy"


async def test_only_labels_that_may_be_learned_from_are_counted(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    base = datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=1))
    await write_posts(db, [Post(base + number, number, "a post", datetime.now(UTC)) for number in range(3)], stream="s")
    await write_feedback(db, [Feedback("neutral", post_id=base + number) for number in range(3)], key_id="k")
    await say(db, 4)
    ask = asks(settings, db, jobs)
    assert (await ask()).criteria[0].value == 7
    await open_eraser(settings, db).remove([], [2], reason="requested")
    assert (await ask()).criteria[0].value == 6
    careful = settings.model_copy(update={"allow_training_on_x_content": False})
    assert (await asks(careful, db, jobs)()).criteria[0].value == 4


async def predict(db: Database, hours_ago: float, share: float, confidence: float, version: str = "m-1") -> None:
    """1,200 posts within the hour after then, with predictions of which `share` are positive."""
    first = datetime.now(UTC) - timedelta(hours=hours_ago)
    ids = [datetime_to_snowflake(first + timedelta(seconds=3 * number)) for number in range(1200)]
    await write_posts(db, [Post(number, 7, "text", first) for number in ids], stream="s")
    rows = []
    for place, post_id in enumerate(ids):
        label = "positive" if place % 100 < share * 100 else "negative"
        sure = min(confidence + 0.001 * (place % 50), 1.0)
        rows.append((post_id, Prediction(label, sure, {label: sure}, version)))
    await write_predictions(db, rows)


async def test_drift_is_seen_against_the_same_hours_of_an_earlier_day(
    settings: Settings, db: Database, jobs: JobServer
) -> None:
    await say(db, 1)
    await predict(db, 20, share=0.5, confidence=0.85)
    ask = asks(settings, db, jobs)
    alone = await ask()
    assert (alone.outcome, alone.model_version) == ("waits", "m-1")
    assert "cannot be told from 1200 predictions of late, 0 of before" in alone.criteria[2].told
    # Another version's predictions tell nothing of this one's.
    await predict(db, 20 + 28 * 24, share=0.1, confidence=0.95, version="m-0")
    await predict(db, 20 + 7 * 24, share=0.5, confidence=0.85)
    calm = await ask()
    assert [one.is_met for one in calm.criteria] == [False] * 5
    assert "7 days ago, 1200 and 1200 predictions" in calm.criteria[2].told

    await predict(db, 20 + 14 * 24, share=0.9, confidence=0.94)
    drifted = await ask()
    assert drifted.outcome == "submits"
    assert {one.name for one in drifted.criteria if one.is_met} == {"label_psi", "confidence_psi", "confidence_drop"}
    assert await stored(db) == [("waits", None), ("waits", None), ("submits", "open")]
    async with db.acquire() as connection:
        kept = json.loads(
            await connection.fetchval("SELECT detail FROM overtone.retrain_decisions WHERE run = $1", drifted.run)
        )
    assert [one["name"] for one in kept["criteria"] if one["is_met"]] == [
        "label_psi",
        "confidence_psi",
        "confidence_drop",
    ]
    assert kept["reasons"] == list(drifted.reasons)


def test_a_command_without_a_server_says_so(settings: Settings, jobs: JobServer) -> None:
    assert settings.database_url is not None
    environment = environment_for(settings, DATABASE_URL=settings.database_url.get_secret_value())
    command = [sys.executable, "-m", "overtone.cli", "retrain"]
    ended = subprocess.run(
        [*command, "--", *OPTIONS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 6
    assert "Nothing runs in" in ended.stderr
    ended = subprocess.run(
        [*command, "--check", "--address", jobs.url],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "--config, --validation" in ended.stderr
