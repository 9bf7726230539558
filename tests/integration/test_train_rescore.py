"""Re-scoring stored posts on real Ray and a real database: once each, whatever is killed, and never what was erased."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from overtone.bundle import TextEncoder, load_bundle
from overtone.cli.database import with_database
from overtone.db import Database
from overtone.db.erasure import erase_posts
from overtone.db.partitions import month_of
from overtone.db.posts import write_posts
from overtone.db.predictions import stats, write_predictions
from overtone.db.rescoring import only_rescoring, plan_rescoring
from overtone.db.tombstones import bury_authors
from overtone.engine import classify_sorted, open_engine
from overtone.errors import UnavailableError
from overtone.schema import Post, Prediction, datetime_to_snowflake
from overtone.settings import environment_for, load_settings
from train.stages import APPLICATION, PostReader, PredictionWriter

pytestmark = pytest.mark.timeout(540)

ROOT = Path(__file__).parents[2]
VERSION = load_bundle().version
OLD = Prediction("neutral", 0.5, {"negative": 0.25, "neutral": 0.5, "positive": 0.25}, "old-1")
NOW = datetime.now(UTC)
POSTS = 600
ERASED_AUTHOR = 8
TEXTS = ("I love this {}", "worst day ever {}", "the train leaves at {}")

T = TypeVar("T")


def made(days_ago: float, number: int, author: int = 7) -> Post:
    instant = NOW - timedelta(days=days_ago, seconds=number)
    return Post(datetime_to_snowflake(instant), author, TEXTS[number % 3].format(number), instant)


class Store:
    """A database with posts that an older version has classified, two thirds of them two months ago."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home
        self.posts = [made(60 if number % 3 else 0, number) for number in range(POSTS)]
        self.do(self._fill)

    async def _fill(self, db: Database) -> None:
        await write_posts(db, self.posts, stream="s")
        await write_predictions(db, [(one.post_id, OLD) for one in self.posts])

    def do(self, work: Callable[[Database], Awaitable[T]]) -> T:
        return with_database(load_settings(database_url=self.url), work)

    def values(self, statement: str, *arguments: Any) -> list[Any]:
        async def fetch(db: Database) -> list[Any]:
            async with db.acquire() as connection:
                return [tuple(row) for row in await connection.fetch(statement, *arguments)]

        return self.do(fetch)

    def scored(self) -> dict[int, datetime]:
        """Posts that the version has classified, and when."""
        return dict(
            self.values("SELECT post_id, stored_at FROM overtone.predictions WHERE model_version = $1", VERSION)
        )

    def command(self, *arguments: str, module: str = "train.rescore") -> list[str]:
        words = ["rescore"] if module == "overtone.cli" else ["--slice-posts", "100"]
        return [sys.executable, "-m", module, *words, *arguments]

    def environment(self) -> dict[str, str]:
        settings = load_settings(overtone_home=self.home)
        return environment_for(settings, DATABASE_URL=self.url, HOME=str(self.home), COLUMNS="200")

    def run(self, *arguments: str, module: str = "train.rescore", code: int = 0) -> dict[str, Any]:
        """What a run to the end says last."""
        ended = subprocess.run(
            [*self.command(*arguments, module=module), "--json"],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert ended.returncode == code, ended.stderr[-3000:]
        if code:
            return {"told": ended.stderr}
        return dict(json.loads(ended.stdout.splitlines()[-1]))

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A run in the background, all of whose processes are gone afterwards."""
        log = self.home / "rescore.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(*arguments), cwd=ROOT, env=self.environment(), stdout=output, stderr=output
            )
        try:
            yield process
        finally:
            kill_tree(process)

    def wait_for_predictions(self, process: subprocess.Popen[bytes]) -> int:
        """Return how many there are once some are, and not all."""
        end = time.monotonic() + 200
        while not (found := len(self.scored())):
            assert process.poll() is None, (self.home / "rescore.log").read_text()[-3000:]
            assert time.monotonic() < end, (self.home / "rescore.log").read_text()[-3000:]
            time.sleep(0.02)
        assert found < POSTS
        return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        process.kill()
    process.wait()


@pytest.fixture
def store(fresh_postgres_url: str, tmp_path: Path) -> Store:
    return Store(fresh_postgres_url, tmp_path)


def test_each_post_gets_one_prediction_and_erased_ones_get_none(store: Store) -> None:
    gone, theirs = [one.post_id for one in store.posts[:5]], [made(0.5, number, ERASED_AUTHOR) for number in range(3)]

    async def prepare(db: Database) -> None:
        await write_posts(db, theirs, stream="s")
        await erase_posts(db, gone, reason="deleted")
        # Posts of an author whose erasure has only begun are still stored.
        await bury_authors(db, [ERASED_AUTHOR], reason="requested")

    store.do(prepare)
    expected = {one.post_id: one.text for one in store.posts if one.post_id not in gone}
    planned = store.run("--dry-run")
    assert (planned["event"], planned["planned"], planned["written"]) == ("rescore.planned", len(expected), 0)
    assert store.scored() == {}

    done = store.run()
    assert done["event"] == "rescore.done"
    assert [done[name] for name in ("planned", "read", "written", "failed")] == [len(expected)] * 3 + [0]
    first = store.scored()
    assert first.keys() == expected.keys()
    assert_as_the_engine_says(store, expected)
    assert store.values("SELECT count(*) FROM overtone.predictions WHERE model_version = 'old-1'") == [(POSTS - 5,)]
    assert store.do(stats).predictions == POSTS - 5 + len(expected), "the tallies count them too"

    again = store.run()
    assert [again[name] for name in ("planned", "read", "written")] == [0, 0, 0]
    assert store.scored() == first


def assert_as_the_engine_says(store: Store, texts: dict[int, str]) -> None:
    rows = store.values(
        "SELECT post_id, label, confidence, scores::text FROM overtone.predictions WHERE model_version = $1", VERSION
    )
    bundle = load_bundle()
    engine = open_engine(bundle)
    scores = classify_sorted(engine, TextEncoder(bundle).encode([texts[post_id] for post_id, *_ in rows]))
    engine.close()
    stored = [[json.loads(written)[label] for label in bundle.labels] for *_, written in rows]
    np.testing.assert_allclose(stored, scores, atol=1e-5)
    assert [label for _, label, *_ in rows] == [bundle.labels[row.argmax()] for row in scores]
    np.testing.assert_allclose([confidence for _, _, confidence, _ in rows], scores.max(axis=1), atol=1e-5)
    assert len(Counter(label for _, label, *_ in rows)) == 3


def test_a_killed_run_goes_on_where_it_stopped(store: Store) -> None:
    with store.running("--rate", "200") as process:
        store.wait_for_predictions(process)
        connections = store.values(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1",
            APPLICATION,
        )
        kill_tree(process)
    assert connections[0][0] <= 3
    first = store.scored()
    assert 0 < len(first) < POSTS

    done = store.run()
    assert done["planned"] == done["written"] == POSTS - len(first)
    both = store.scored()
    assert len(both) == POSTS
    assert {post_id: both[post_id] for post_id in first} == first, "what was stored was left as it was"


def test_a_killed_worker_is_replaced(store: Store) -> None:
    with store.running("--rate", "200") as process:
        store.wait_for_predictions(process)
        (victim,) = [
            one
            for one in psutil.Process(process.pid).children(recursive=True)
            if "Scorer" in " ".join(one.cmdline()) and "ray::" in " ".join(one.cmdline())
        ]
        victim.kill()
        assert process.wait(timeout=200) == 0, (store.home / "rescore.log").read_text()[-3000:]
    assert store.scored().keys() == {one.post_id for one in store.posts}


def test_the_command_takes_the_posts_of_a_time_and_the_bundle_that_is_served(store: Store) -> None:
    newest = [one.post_id for one in store.posts[::3]]
    planned = store.run("--champion", "--since", "7d", "--dry-run", module="overtone.cli")
    assert (planned["planned"], planned["stored"], planned["model_version"]) == (len(newest), len(newest), VERSION)
    done = store.run("--since", "7d", module="overtone.cli")
    assert done["written"] == len(newest)
    assert sorted(store.scored()) == sorted(newest)


def test_two_runs_of_one_version_do_not_go_at_once(store: Store) -> None:
    async def hold(db: Database) -> dict[str, Any]:
        async with only_rescoring(db, VERSION):
            other = await Database.open(store.url, max_size=1)
            try:
                with pytest.raises(UnavailableError, match="Another command"):
                    await only_rescoring(other, VERSION).__aenter__()
                async with only_rescoring(other, "another-version"):
                    return await asyncio.to_thread(store.run, module="overtone.cli", code=6)
            finally:
                await other.close()

    assert "Another command is re-scoring" in store.do(hold)["told"]

    async def after(db: Database) -> None:
        async with only_rescoring(db, VERSION):
            pass
        async with only_rescoring(db, VERSION):
            pass

    store.do(after)


def test_slices_keep_to_months_and_hold_every_post_once(store: Store) -> None:
    plan = store.do(lambda db: plan_rescoring(db, VERSION, rows=70))
    assert (plan.stored, plan.posts) == (POSTS, POSTS)
    assert all(one.posts <= 70 and month_of(one.first) == month_of(one.last) for one in plan.slices)
    ends = [end for one in plan.slices for end in (one.first, one.last)]
    assert ends == sorted(ends)
    ids = sorted(one.post_id for one in store.posts)
    assert [sum(one.first <= post_id <= one.last for one in plan.slices) for post_id in ids] == [1] * POSTS
    assert store.do(lambda db: plan_rescoring(db, "old-1", rows=70)).slices == ()


def test_what_is_erased_between_reading_and_writing_is_not_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", store.url)
    ids = sorted(one.post_id for one in store.posts)[:10]
    reader, writer = PostReader(VERSION, None), PredictionWriter(VERSION, load_bundle().labels)
    with contextlib.closing(reader), contextlib.closing(writer):
        (read,) = reader({"first": np.array([ids[0]]), "last": np.array([ids[-1]])})
        assert read["post_id"].tolist() == ids
        store.do(lambda db: erase_posts(db, ids[:4], reason="deleted"))
        scores = np.tile(np.float32([0.1, 0.2, 0.7]), (10, 1))
        scores[9] = np.nan
        counts = writer({"post_id": read["post_id"], "scores": scores})
        assert {name: column.tolist() for name, column in counts.items()} == {
            "read": [10],
            "written": [5],
            "failed": [1],
        }
        assert sorted(store.scored()) == ids[4:9]
        assert list(reader({"first": np.array([ids[0]]), "last": np.array([ids[8]])})) == []
