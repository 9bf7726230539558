"""Re-scoring as a job: each stored post once, whatever dies or is swapped in between, and never what was erased."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from job_world import World, open_world
from overtone.bundle import Bundle, load_bundle, write_bundle
from overtone.db import Database
from overtone.db.erasure import erase_posts
from overtone.db.jobs import Holders
from overtone.db.keys import create_key
from overtone.db.posts import write_posts
from overtone.db.predictions import stats, write_predictions
from overtone.db.tombstones import bury_authors
from overtone.errors import BundleError, DatabaseUnavailableError, UnavailableError
from overtone.schema import Post, Prediction, datetime_to_snowflake
from serve.classifier import Classifier
from serve.scoring import Scorer

VERSION = load_bundle().version
OLD = Prediction("neutral", 0.5, {"negative": 0.25, "neutral": 0.5, "positive": 0.25}, "old-1")
NOW = datetime.now(UTC)
TEXTS = ("I love this {}", "worst day ever {}", "the train leaves at {}")
POSTS = 24
SLICE = 5


def made(days_ago: float, number: int, author: int = 7) -> Post:
    instant = NOW - timedelta(days=days_ago, seconds=number)
    return Post(datetime_to_snowflake(instant), author, TEXTS[number % 3].format(number), instant)


def other_bundle(folder: Path) -> Bundle:
    """The bundle of the package under another version."""
    shutil.copytree(load_bundle().path, folder)
    return write_bundle(folder, spec=replace(load_bundle().spec, name="second"))


class Rescoring(World):
    """A world whose posts an older version has classified, two thirds of them two months ago."""

    posts: list[Post]
    admin: Mapping[str, str]

    async def ask(self, body: Any = None, *, status: int = 202, **headers: str) -> Any:
        given = {} if body is None else {"json": body}
        answer = await self.client.post("/jobs/rescoring", headers={**self.admin, **headers}, **given)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def seen(self, job: Mapping[str, Any]) -> Any:
        return (await self.client.get(f"/jobs/{job['job_id']}", headers=self.admin)).json()

    async def planned(self, body: Any = None) -> Any:
        """A job whose spans wait in the queue, and nothing else."""
        self.queue.tasks.clear()
        job = await self.ask(body)
        await self.dispatcher.step()
        assert await self.scorer.score(self.queue.tasks.popleft()) == "done"
        await self.dispatcher.step()
        return await self.seen(job)

    async def predicted(self) -> dict[str, list[int]]:
        """The posts that each version has classified, in the order of their ids."""
        async with self.db.acquire() as connection:
            rows = await connection.fetch(
                "SELECT model_version, array_agg(post_id ORDER BY post_id) AS posts"
                " FROM overtone.predictions GROUP BY model_version"
            )
        return {row["model_version"]: row["posts"] for row in rows}

    @property
    def ids(self) -> list[int]:
        return sorted(post.post_id for post in self.posts)


@pytest.fixture
async def world(
    fresh_database: Database,
    fresh_postgres_url: str,
    classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Rescoring]:
    monkeypatch.setattr("serve.rescoring.SLICE_POSTS", SLICE)
    async with open_world(fresh_database, fresh_postgres_url, classifier, tmp_path / "jobs") as world:
        world.__class__ = Rescoring
        assert isinstance(world, Rescoring)
        world.scorer.pause_s = 0.0
        world.posts = [made(60 if number % 3 else 0.5, number) for number in range(POSTS)]
        await write_posts(world.db, world.posts, stream="s")
        await write_predictions(world.db, [(post.post_id, OLD) for post in world.posts])
        _, secret = await create_key(world.db, "chief", ["admin"])
        world.admin = {"x-api-key": secret}
        yield world


async def test_each_stored_post_gets_one_prediction_and_erased_ones_get_none(world: Rescoring) -> None:
    gone, theirs = world.ids[:3], [made(0.2, 100 + number, author=8) for number in range(2)]
    await write_posts(world.db, theirs, stream="s")
    await erase_posts(world.db, gone, reason="requested")
    # Posts of an author whose erasure has only begun are still stored.
    await bury_authors(world.db, [8], reason="requested")
    have = world.ids[-2:]
    first = replace(OLD, model_version=VERSION)
    await write_predictions(world.db, [(post_id, first) for post_id in have])
    job = await world.ask()
    assert (job["kind"], job["state"], job["total"], job["progress"]) == ("rescore", "queued", None, 0.0)
    await world.work()
    job = await world.seen(job)
    expected = [post_id for post_id in world.ids[3:] if post_id not in have]
    assert (job["state"], job["done"], job["failed"], job["total"]) == ("succeeded", len(expected), 0, len(expected))
    assert job["outcome"] == {"model_version": VERSION, "looked_at": POSTS - 1, "written": len(expected)}
    assert (job["progress"], bool(job["finished_at"]), job["problems"]) == (1.0, True, [])
    assert await world.predicted() == {VERSION: world.ids[3:], OLD.model_version: world.ids[3:]}
    async with world.db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT p.text, q.label FROM overtone.predictions q JOIN overtone.posts p USING (post_id)"
            " WHERE q.model_version = $1 AND NOT post_id = ANY($2)",
            VERSION,
            have,
        )
    assert {row["label"] for row in rows if "love" in row["text"]} == {"positive"}
    assert {row["label"] for row in rows if "worst" in row["text"]} == {"negative"}
    # The page's counts go with it.
    assert (await stats(world.db)).predictions == 2 * (POSTS - 3)
    assert not world.root.exists()


async def test_where_nothing_lacks_a_prediction_a_job_has_succeeded_with_no_post(world: Rescoring) -> None:
    await world.ask()
    await world.work()
    again = await world.ask({"since_days": 3650})
    await world.work()
    again = await world.seen(again)
    assert (again["state"], again["done"], again["total"], again["progress"]) == ("succeeded", 0, 0, 1.0)
    assert (again["outcome"]["looked_at"], again["outcome"]["written"]) == (POSTS, 0)
    assert await world.dispatcher.step() == 0


async def test_only_posts_of_the_last_days_and_the_newest_first(world: Rescoring) -> None:
    newest = sorted(post.post_id for post in world.posts if post.created_at > NOW - timedelta(days=30))
    job = await world.planned({"since_days": 30})
    assert (job["state"], job["total"]) == ("running", len(newest))
    await world.scorer.score(world.queue.tasks.popleft())
    assert (await world.predicted())[VERSION] == newest[-(len(newest) % SLICE or SLICE) :]
    await world.work()
    assert (await world.predicted())[VERSION] == newest


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"since_days": 0}', 422, "since_days"),
        (b'{"since_days": 3651}', 422, "since_days"),
        (b'{"since_days": "7"}', 422, "since_days"),
        (b'{"since_days": true}', 422, "since_days"),
        (b'{"since_days": 1.5}', 422, "since_days"),
        (b'{"since": 1}', 422, "body"),
        (b"[]", 422, "body"),
        (b"{", 400, "body"),
        (b" " * 5000, 413, "body"),
    ],
)
async def test_what_is_wrong_is_named_and_makes_no_job(world: Rescoring, body: bytes, status: int, field: str) -> None:
    headers = {**world.admin, "content-type": "application/json"}
    answer = await world.client.post("/jobs/rescoring", content=body, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (status, field)
    assert (await world.client.get("/jobs", headers=world.admin)).json() == {"jobs": []}


async def test_the_request_is_an_administrators_and_makes_one_job(world: Rescoring) -> None:
    assert (await world.client.post("/jobs/rescoring")).status_code == 403
    plain = await world.client.post("/jobs/rescoring", content=b"{}", headers={**world.admin, "content-type": "text/x"})
    assert plain.status_code == 415
    jobs = [await world.ask(body, **{"idempotency-key": "night"}) for body in (None, {}, {"since_days": 7})]
    assert len({job["job_id"] for job in jobs}) == 1


class Wrapped:
    """The API, with something that happens before each answer."""

    def __init__(self, world: World, before: Callable[[Sequence[str]], Any]) -> None:
        self.world = world
        self.before = before

    async def __call__(self, texts: Sequence[str], options: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        await self.before(texts)
        async for answer in self.world.api(texts, options):
            yield answer


async def test_what_is_erased_while_it_is_classified_is_not_stored(world: Rescoring) -> None:
    gone: list[int] = []

    async def erase(texts: Sequence[str]) -> None:
        gone.extend(post.post_id for post in world.posts if post.text == texts[0])
        await erase_posts(world.db, gone, reason="requested")

    world.scorer.classify = Wrapped(world, erase)
    job = await world.ask()
    await world.work()
    job = await world.seen(job)
    assert (job["state"], job["done"], job["outcome"]["written"]) == ("succeeded", POSTS, POSTS - len(gone))
    assert gone
    assert (await world.predicted())[VERSION] == [post_id for post_id in world.ids if post_id not in gone]


@pytest.mark.parametrize("is_killed", [True, False])
async def test_a_consumer_that_falls_silent_is_followed_by_another(world: Rescoring, is_killed: bool) -> None:
    job = await world.planned()
    has_begun, goes_on = asyncio.Event(), asyncio.Event()

    async def hang(_texts: Sequence[str]) -> None:
        has_begun.set()
        await goes_on.wait()

    # Nobody speaks for what it holds, which counts as lost at once.
    silent = Scorer(world.db, world.root, Wrapped(world, hang), Holders(hold_s=0.0))
    working = asyncio.create_task(silent.score(world.queue.tasks.popleft()))
    await has_begun.wait()
    if is_killed:
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
    await world.work()
    job = await world.seen(job)
    assert (job["state"], job["done"], job["outcome"]["written"]) == ("succeeded", POSTS, POSTS)
    if not is_killed:
        goes_on.set()
        assert await working == "skipped"
    assert await world.seen(job) == job
    assert (await world.predicted())[VERSION] == world.ids
    assert (await stats(world.db)).predictions == 2 * POSTS


async def test_predictions_are_stored_and_counted_together_or_not_at_all(
    world: Rescoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await world.planned()
    name = world.queue.tasks.popleft()

    async def lost(*_: Any) -> None:
        raise DatabaseUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("overtone.db.job_spans.count_chunk", lost)
        with pytest.raises(DatabaseUnavailableError):
            await world.scorer.score(name)
    assert VERSION not in await world.predicted()
    outcomes = await asyncio.gather(*(world.scorer.score(name) for _ in range(4)))
    assert sorted(outcomes) == ["done", "skipped", "skipped", "skipped"]
    await world.work()
    job = await world.seen(job)
    assert (job["state"], job["outcome"]["written"]) == ("succeeded", POSTS)


async def test_a_plan_that_is_made_twice_counts_once(world: Rescoring) -> None:
    job = await world.ask()
    await world.dispatcher.step()
    [name] = world.queue.tasks
    hasty = Scorer(world.db, world.root, world.api, Holders(hold_s=0.0))
    assert sorted(await asyncio.gather(hasty.score(name), hasty.score(name))) == ["done", "skipped"]
    await world.work()
    assert (await world.seen(job))["done"] == (await world.seen(job))["total"] == POSTS


async def test_a_job_that_is_cancelled_keeps_what_is_done_and_does_no_more(world: Rescoring) -> None:
    job = await world.planned()
    await world.scorer.score(world.queue.tasks.popleft())
    done = await world.predicted()

    async def cancel(_texts: Sequence[str]) -> None:
        await world.client.post(f"/jobs/{job['job_id']}/cancel", headers=world.admin)

    world.scorer.classify = Wrapped(world, cancel)
    assert await world.scorer.score(world.queue.tasks.popleft()) == "skipped"
    assert await world.predicted() == done
    cancelled = await world.seen(job)
    assert (cancelled["state"], cancelled["done"]) == ("cancelled", len(done[VERSION]))
    assert await world.dispatcher.step() == 0
    unplanned = await world.ask()
    await world.client.post(f"/jobs/{unplanned['job_id']}/cancel", headers=world.admin)
    await world.work()
    assert (await world.seen(unplanned))["total"] is None


async def test_a_swap_ends_the_job_which_goes_on_when_its_model_is_back(
    world: Rescoring, classifier: Classifier, tmp_path: Path
) -> None:
    second = other_bundle(tmp_path / "second").version
    job = await world.planned()
    await world.scorer.score(world.queue.tasks.popleft())
    done = (await world.predicted())[VERSION]
    await classifier.load(tmp_path / "second")
    with pytest.raises(BundleError, match=second):
        await world.scorer.score(world.queue.tasks.popleft())
    failed = await world.seen(job)
    assert (failed["state"], failed["done"]) == ("failed", len(done))
    assert f"answers with {second} now, and this job is for {VERSION}" in failed["error"]
    # What the other version said is its own, and nothing of it is done again.
    predicted = await world.predicted()
    assert predicted[VERSION] == done
    assert set(predicted[second]).isdisjoint(done)
    later = await world.planned()
    assert later["total"] == POSTS - len(predicted[second])
    await world.work()
    assert (await world.seen(later))["outcome"]["written"] == later["total"]
    await classifier.load(None)
    await world.client.post(f"/jobs/{job['job_id']}/resume", headers=world.admin)
    await world.work()
    resumed = await world.seen(job)
    assert (resumed["state"], resumed["done"], resumed["error"]) == ("succeeded", POSTS, None)
    assert await world.predicted() == dict.fromkeys((OLD.model_version, VERSION, second), world.ids)


class TwoModels:
    """An API that answers by the version whose turn it is."""

    def __init__(self, *turns: str) -> None:
        self.turns = list(turns)
        self.asked: Counter[str] = Counter()

    async def __call__(self, texts: Sequence[str], options: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        for text in texts:
            version = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
            self.asked[text] += 1
            scores = {"negative": 0.1, "neutral": 0.2, "positive": 0.7}
            yield {"label": "positive", "confidence": 0.7, "scores": scores, "model_version": version}


async def test_answers_of_a_challenger_are_stored_as_its_own_and_asked_again(world: Rescoring) -> None:
    job = await world.planned()
    world.scorer.classify = TwoModels(*["trial-1", VERSION] * 200)
    await world.work()
    job = await world.seen(job)
    predicted = await world.predicted()
    assert (job["state"], job["done"], predicted[VERSION]) == ("succeeded", POSTS, world.ids)
    assert 0 < len(predicted["trial-1"]) < POSTS
    assert job["outcome"]["written"] == POSTS + len(predicted["trial-1"])


async def test_where_the_version_answers_seldom_the_chunk_is_tried_again(world: Rescoring) -> None:
    job = await world.planned()
    name = world.queue.tasks.popleft()
    world.scorer.classify = seldom = TwoModels(VERSION, "trial-1")
    with pytest.raises(UnavailableError, match="trial-1"):
        await world.scorer.score(name)
    assert (await world.seen(job))["state"] == "running"
    assert len((await world.predicted())[VERSION]) == 1
    # Nobody is asked for ever.
    assert max(seldom.asked.values()) < 20
    world.scorer.classify = world.api
    assert await world.scorer.score(name) == "done"
    await world.work()
    assert (await world.seen(job))["state"] == "succeeded"
    assert (await world.predicted())[VERSION] == world.ids


async def test_a_text_that_no_model_takes_is_counted_and_holds_up_no_other(world: Rescoring) -> None:
    blank = replace(made(0.1, 500), text=" ")
    await write_posts(world.db, [blank], stream="s")
    job = await world.ask()
    await world.work()
    job = await world.seen(job)
    assert (job["state"], job["done"], job["failed"]) == ("succeeded", POSTS + 1, 1)
    assert blank.post_id not in (await world.predicted())[VERSION]


async def test_an_api_that_is_away_fails_the_job_at_last_which_is_resumed(world: Rescoring) -> None:
    job = await world.planned()

    async def away(_texts: Sequence[str]) -> None:
        raise UnavailableError("The API is away.")

    world.scorer.classify = Wrapped(world, away)
    with pytest.raises(UnavailableError):
        await world.scorer.score(world.queue.tasks.popleft(), is_last_try=True)
    assert (await world.seen(job))["error"] == "Chunk 2: The API is away."
    world.scorer.classify = world.api
    await world.client.post(f"/jobs/{job['job_id']}/resume", headers=world.admin)
    await world.work()
    assert (await world.predicted())[VERSION] == world.ids


async def test_the_result_of_a_rescoring_is_no_file(world: Rescoring) -> None:
    job = await world.ask()
    early = await world.client.get(f"/jobs/{job['job_id']}/result", headers=world.admin)
    assert (early.status_code, early.json()["code"]) == (409, "not_ready")
    await world.work()
    result: httpx.Response = await world.client.get(f"/jobs/{job['job_id']}/result", headers=world.admin)
    assert (result.status_code, result.content) == (200, b"")
    removed = await world.client.delete(f"/jobs/{job['job_id']}", headers=world.admin)
    assert removed.status_code == 204
    async with world.db.acquire() as connection:
        left = await connection.fetchval(
            "SELECT count(*) FROM overtone.job_chunks WHERE job_id = $1", UUID(job["job_id"])
        )
    assert left == 0
    assert "text" not in json.dumps(job)
