"""Jobs from the upload to the result, over a real socket and PostgreSQL; consumers that fail, and an API that does."""

import asyncio
import csv
import gzip
import io
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest

from job_world import NDJSON, World, until
from overtone.db import jobs
from overtone.db.jobs import Holders
from overtone.db.keys import create_key
from overtone.erasure import open_eraser
from overtone.errors import ConfigurationError, InvalidInputError, UnavailableError
from overtone.job_files import JobFolder
from overtone.settings import load_settings
from serve.chores import Chores
from serve.scoring import Scorer
from serve.uploads import CHUNK_LINES


async def test_each_line_of_an_upload_has_one_line_in_the_result(world: World) -> None:
    texts = ["I love this", "worst service ever", "it is a phone"]
    rows = [{"id": f"n-{number}", "text": texts[number % 3]} for number in range(CHUNK_LINES + 100)]
    rows[7] = {"id": "n-7", "text": "  "}
    job = await world.submit(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert (job["state"], job["total"], job["done"]) == ("queued", len(rows), 0)
    assert job["problems"][0] | {"line": 8, "field": "text"} == job["problems"][0]
    await world.work()
    job = await world.job(job["job_id"])
    assert (job["state"], job["done"], job["failed"], job["progress"]) == ("succeeded", len(rows), 1, 1.0)
    result = await world.result(job["job_id"])
    assert [(row["line"], row["id"]) for row in result] == [(n + 1, f"n-{n}") for n in range(len(rows))]
    assert {row["label"] for row in result[::3]} == {"positive"}
    assert {row["label"] for number, row in enumerate(result[1::3]) if number != 2} == {"negative"}
    assert result[7] == {
        "line": 8,
        "id": "n-7",
        "error": {"code": "invalid_input", "detail": "text must hold more than white space."},
    }
    assert not any("text" in row for row in result)
    assert world.files(job["job_id"]) == {"result"}


async def test_csv_comes_packed_and_with_options(world: World) -> None:
    table = io.StringIO()
    csv.writer(table).writerows([["said", "post_id"], ["I love\nthis", "17"], ["so so", "18"]])
    headers = {"content-type": "text/csv; charset=utf-8", "content-encoding": "gzip"}
    body = gzip.compress(table.getvalue().encode())
    job = await world.submit(body, headers=headers, column="said", top_k="1", threshold="0.99999", long_text="window")
    await world.work()
    first, second = await world.result(job["job_id"])
    assert (first["line"], first["post_id"], second["line"], len(first["scores"])) == (2, "17", 4, 1)
    assert (first["abstained"], first["label"]) == (True, None)


@pytest.mark.parametrize(
    ("body", "headers", "query", "status", "field"),
    [
        (b"", NDJSON, {}, 422, "body"),
        (b'"x"\n{"text": 7}\n', NDJSON, {"invalid": "reject"}, 422, "line 2, text"),
        (b'"x"\n', NDJSON, {"column": "a;b"}, 422, "column"),
        (b'"x"\n', NDJSON, {"invalid": "maybe"}, 422, "invalid"),
        (b'"x"\n', NDJSON, {"top_k": "9"}, 422, "top_k"),
        (b'"x"\n', NDJSON, {"explain": "true"}, 422, "explain"),
        (b'"x"\n', NDJSON, {"speed": "1"}, 422, "speed"),
        (b'"x"\n', {**NDJSON, "idempotency-key": "x" * 201}, {}, 422, "Idempotency-Key"),
        (b"words,id\nhush-hush,1\n", {"content-type": "text/csv"}, {}, 422, "text"),
        (b'"x"\n' * 20_001, NDJSON, {}, 413, "body"),
        (b'"%s"\n' % (b"x" * 1000) * 3000, NDJSON, {}, 413, "body"),
        (b'"x"\n', {"content-type": "application/json"}, {}, 415, None),
        (b'"x"\n', {**NDJSON, "content-encoding": "br"}, {}, 415, None),
        (b"not gzip", {**NDJSON, "content-encoding": "gzip"}, {}, 400, None),
    ],
)
async def test_what_is_wrong_is_a_problem_and_leaves_nothing(
    world: World, body: bytes, headers: dict[str, str], query: dict[str, str], status: int, field: str | None
) -> None:
    problem = await world.submit(body, headers=headers, status=status, **query)
    assert [item["field"] for item in problem["errors"]] == ([field] if field else [])
    assert "hush" not in json.dumps(problem)
    assert not world.root.exists() or not list(world.root.iterdir())
    assert await jobs.list_jobs(world.db, key_id=None, limit=10) == []


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(world: World) -> None:
    body = b"POST /jobs HTTP/1.1\r\nhost: x\r\nx-api-key: %s\r\ncontent-type: application/x-ndjson\r\n" % (
        world.secret.encode()
    )
    _, writer = await asyncio.open_connection("127.0.0.1", world.client.base_url.port)
    writer.write(body + b"content-length: 1000000\r\n\r\n" + b'"love"\n' * 5000)
    await writer.drain()
    await until(lambda: list(world.root.rglob("*.rows")))
    writer.close()
    await until(lambda: not list(world.root.iterdir()))
    assert await jobs.list_jobs(world.db, key_id=None, limit=10) == []


async def test_the_same_request_makes_one_job(world: World) -> None:
    headers = {**NDJSON, "idempotency-key": "once"}
    answers = await asyncio.gather(*(world.submit(b'"love"\n', headers=headers) for _ in range(2)))
    assert len({answer["job_id"] for answer in answers}) == 1
    assert (await world.submit(b"other", headers=headers))["job_id"] == answers[0]["job_id"]
    assert len(list(world.root.iterdir())) == 1
    await world.work()
    assert len(await world.result(answers[0]["job_id"])) == 1


async def test_a_key_has_so_many_jobs_under_way(world: World) -> None:
    made = [await world.submit(b'"love"\n') for _ in range(3)]
    assert (await world.submit(b'"love"\n', status=429))["code"] == "quota_exceeded"
    await world.client.post(f"/jobs/{made[0]['job_id']}/cancel")
    await world.submit(b'"love"\n')


async def test_jobs_are_their_owners_and_the_administrators(world: World) -> None:
    job = await world.submit(b'"love"\n')
    _, other = await create_key(world.db, "other", ["predict"])
    _, admin = await create_key(world.db, "chief", ["admin"])
    _, reader = await create_key(world.db, "reader", ["read"])
    for method, path in (
        ("GET", ""),
        ("GET", "/result"),
        ("POST", "/cancel"),
        ("POST", "/resume"),
        ("DELETE", ""),
    ):
        address = f"/jobs/{job['job_id']}{path}"
        assert (await world.client.request(method, address, headers={"x-api-key": other})).status_code == 404
        assert (await world.client.request(method, address, headers={"x-api-key": reader})).status_code == 403
        assert (await world.client.request(method, address, headers={"x-api-key": "no"})).status_code == 401
    counts = [
        len((await world.client.get("/jobs", headers={"x-api-key": key})).json()["jobs"])
        for key in (world.secret, other, admin)
    ]
    assert counts == [1, 0, 1]
    assert (await world.client.get(f"/jobs/{job['job_id']}", headers={"x-api-key": admin})).status_code == 200
    assert (await world.client.get(f"/jobs/{uuid4()}")).status_code == 404
    assert (await world.client.get("/jobs/17")).status_code == 422
    assert (await world.client.get("/jobs?limit=0")).status_code == 422


async def test_a_job_that_is_cancelled_keeps_what_is_done(world: World) -> None:
    job = await world.submit(b'"love"\n' * (CHUNK_LINES + 1))
    address = f"/jobs/{job['job_id']}"
    assert (await world.client.get(f"{address}/result")).json()["code"] == "not_ready"
    await world.dispatcher.step()
    await world.scorer.score(world.queue.tasks.popleft())
    cancelled = (await world.client.post(f"{address}/cancel")).json()
    assert (cancelled["state"], cancelled["done"]) == ("cancelled", CHUNK_LINES)
    assert await world.scorer.score(world.queue.tasks.popleft()) == "skipped"
    assert len(await world.result(job["job_id"])) == CHUNK_LINES
    assert world.files(job["job_id"]) == {"result"}
    assert (await world.client.delete(address)).status_code == 204
    assert (await world.client.get(address)).status_code == 404
    assert not (world.root / job["job_id"]).exists()


async def test_a_task_that_is_delivered_twice_is_done_once(world: World) -> None:
    job = await world.submit(b'"love"\n' * 600)
    await world.dispatcher.step()
    [name] = world.queue.tasks
    outcomes = await asyncio.gather(*(world.scorer.score(name) for _ in range(4)))
    assert sorted(outcomes) == ["done", "skipped", "skipped", "skipped"]
    assert await world.scorer.score(name) == "skipped"
    assert (await world.job(job["job_id"]))["done"] == len(await world.result(job["job_id"])) == 600


async def test_what_a_dead_consumer_held_and_the_broker_lost_is_done_by_another(world: World) -> None:
    job = await world.submit(b'"love"\n' * (2 * CHUNK_LINES))
    await world.dispatcher.step()
    assert await jobs.claim_chunk(world.db, world.queue.tasks[0], uuid4(), hold_s=0.0)
    world.queue.tasks.clear()
    world.queue.is_away = True
    assert await world.dispatcher.step() == 0
    world.queue.is_away = False
    await world.work()
    assert (await world.job(job["job_id"]))["state"] == "succeeded"
    assert [row["line"] for row in await world.result(job["job_id"])] == list(range(1, 2 * CHUNK_LINES + 1))


async def test_a_broker_that_takes_no_task_is_given_it_later(world: World) -> None:
    job = await world.submit(b'"love"\n')
    refuse = world.queue.send

    def fails(task: str, arguments: Sequence[Any]) -> None:
        raise UnavailableError("away")

    world.queue.send = fails  # type: ignore[method-assign]
    assert await world.dispatcher.step() == 0
    world.queue.send = refuse  # type: ignore[method-assign]
    await world.work()
    assert (await world.job(job["job_id"]))["state"] == "succeeded"


class BrokenApi:
    """Answers some lines and then fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    async def __call__(self, texts: Sequence[str], options: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.calls += 1
        yield {"label": "positive"}
        raise self.error


async def test_an_api_that_is_away_is_tried_again_and_fails_the_job_at_last(world: World) -> None:
    job = await world.submit(b'"love"\n"hate"\n')
    await world.dispatcher.step()
    name, broken = world.queue.tasks.popleft(), BrokenApi(UnavailableError("The API is away."))
    scorer = Scorer(world.db, world.root, broken, patience_s=2.0)
    with pytest.raises(UnavailableError):
        await scorer.score(name)
    assert broken.calls == 3
    assert (await world.job(job["job_id"]))["state"] == "running"
    scorer.patience_s = 0.0
    with pytest.raises(UnavailableError):
        await scorer.score(name, is_last_try=True)
    failed = await world.job(job["job_id"])
    assert (failed["state"], failed["error"]) == ("failed", "Chunk 1: The API is away.")
    assert await world.result(job["job_id"]) == []
    await world.dispatcher.tidy()
    resumed = (await world.client.post(f"/jobs/{job['job_id']}/resume")).json()
    assert (resumed["state"], resumed["error"], resumed["finished_at"]) == ("running", None, None)
    await world.work()
    assert len(await world.result(job["job_id"])) == 2
    assert (await world.client.post(f"/jobs/{job['job_id']}/resume")).status_code == 422


async def test_what_trying_again_cannot_help_fails_at_once(world: World) -> None:
    job = await world.submit(b'"love"\n')
    await world.dispatcher.step()
    scorer = Scorer(world.db, world.root, BrokenApi(InvalidInputError("top_k is too large.")))
    with pytest.raises(InvalidInputError):
        await scorer.score(world.queue.tasks.popleft())
    assert (await world.job(job["job_id"]))["error"] == "Chunk 1: top_k is too large."


async def test_a_text_that_the_model_refuses_is_a_line_with_an_error(world: World) -> None:
    long = "word " * 600
    job = await world.submit(b'"love"\n"%s"\n' % long.encode(), long_text="reject")
    await world.work()
    job = await world.job(job["job_id"])
    assert (job["state"], job["failed"], job["problems"][0]["line"]) == ("succeeded", 1, 2)
    assert (await world.result(job["job_id"]))[1]["error"]["code"] == "invalid_input"


async def test_what_is_erased_is_in_no_result_whenever_that_happens(
    world: World, fresh_postgres_url: str, tmp_path: Path
) -> None:
    settings = load_settings(database_url=fresh_postgres_url, overtone_home=tmp_path / "home", jobs_folder=world.root)
    eraser = open_eraser(settings, world.db)
    rows = [
        {"text": "love", "post_id": str(post), "author_id": str(author)}
        for post, author in ((1001, 91), (1002, 92), (1003, 93), (1004, 94))
    ]
    body = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    before = await world.submit(body)
    await world.work()
    waiting = await world.submit(body)
    await eraser.erase("post", 1001, actor="test")
    await eraser.erase("author", 92, actor="test")
    assert [row["post_id"] for row in await world.result(before["job_id"])] == ["1003", "1004"]
    folder = JobFolder(world.root, UUID(waiting["job_id"]))
    assert [row["post_id"] for row in folder.read_input(1)] == ["1003", "1004"]
    late = await world.submit(body)
    await world.work()
    for job in (waiting, late):
        assert [row["post_id"] for row in await world.result(job["job_id"])] == ["1003", "1004"]
        assert (await world.job(job["job_id"]))["state"] == "succeeded"


async def test_tidying_removes_what_nobody_needs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old, other = await world.submit(b'"love"\n'), await world.submit(b'"love"\n')
    await jobs.end_job(world.db, UUID(old["job_id"]), "failed", "x")
    await jobs.end_job(world.db, UUID(other["job_id"]), "cancelled")
    async with world.db.acquire() as connection:
        await connection.execute(
            "UPDATE overtone.jobs SET finished_at = now() - interval '8 days' WHERE job_id = $1", UUID(old["job_id"])
        )
    orphan = JobFolder(world.root, uuid4())
    orphan.make()
    await world.dispatcher.tidy()
    assert {path.name for path in world.root.iterdir()} == {other["job_id"], str(orphan.job_id)}
    assert world.files(other["job_id"]) == set()
    monkeypatch.setattr("serve.scoring._is_old", lambda _path: True)
    await world.dispatcher.tidy()
    assert {path.name for path in world.root.iterdir()} == {other["job_id"]}


async def test_chores_are_jobs_of_administrators(world: World, fresh_postgres_url: str, tmp_path: Path) -> None:
    settings = load_settings(database_url=fresh_postgres_url, overtone_home=tmp_path / "home", jobs_folder=world.root)
    _, admin = await create_key(world.db, "chief", ["admin"])
    chores, key = Chores(settings, world.db, Holders()), {"x-api-key": admin}
    uploaded = await world.submit(b'{"text": "love", "author_id": "92"}\n{"text": "hate", "author_id": "93"}\n')
    await world.work()
    assert (await world.client.post("/jobs/retention")).status_code == 403
    wrong = await world.client.post("/jobs/erasure", json={"kind": "author", "id": "x"}, headers=key)
    assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "id")
    made = [
        (await world.client.post("/jobs/retention", headers={**key, "idempotency-key": "night"})).json(),
        (await world.client.post("/jobs/erasure", json={"kind": "author", "id": "92"}, headers=key)).json(),
    ]
    again = (await world.client.post("/jobs/retention", headers={**key, "idempotency-key": "night"})).json()
    assert again["job_id"] == made[0]["job_id"]
    assert await world.dispatcher.step() == 2
    for name in list(world.queue.chores) * 2:
        await chores.do(name)
    retained, erased = [(await world.client.get(f"/jobs/{one['job_id']}", headers=key)).json() for one in made]
    assert (retained["state"], retained["outcome"]["dropped"]) == ("succeeded", [])
    assert (erased["state"], erased["outcome"]["body"]["id"]) == ("succeeded", "92")
    assert erased["outcome"]["body"]["removed"]["lines_of_files"] == 1
    assert [row["author_id"] for row in await world.result(uploaded["job_id"])] == ["93"]


async def test_a_chore_that_cannot_be_done_fails_its_job_at_last(
    world: World, fresh_postgres_url: str, tmp_path: Path
) -> None:
    settings = load_settings(database_url=fresh_postgres_url, overtone_home=tmp_path, erasure_signing_key="short")
    _, admin = await create_key(world.db, "chief", ["admin"])
    body = {"kind": "post", "id": "17"}
    job = (await world.client.post("/jobs/erasure", json=body, headers={"x-api-key": admin})).json()
    await world.dispatcher.step()
    with pytest.raises(ConfigurationError):
        await Chores(settings, world.db, Holders()).do(world.queue.chores[0])
    failed = (await world.client.get(f"/jobs/{job['job_id']}", headers={"x-api-key": admin})).json()
    assert failed["state"] == "failed"
    assert "ERASURE_SIGNING_KEY" in failed["error"]
