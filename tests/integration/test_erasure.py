"""Erasing everywhere, by the API and by the command: gone from every table and file, proven, and never back."""

import asyncio
import base64
import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from overtone.cli.app import app
from overtone.db import Database
from overtone.db.audit import read_audit
from overtone.db.keys import create_key
from overtone.db.posts import write_dead_letter, write_posts
from overtone.db.predictions import write_predictions
from overtone.erasure import digest_of, open_eraser
from overtone.errors import DataError, InvalidInputError
from overtone.receipts import public_key, signing_key, verify
from overtone.schema import Post, Prediction, datetime_to_snowflake
from overtone.settings import Settings, load_settings
from serve.auth import Gate, KeyRing
from serve.http import create_app
from serve.service import Service
from serve.store import Store

SIGNING = base64.b64encode(b"s" * 32).decode()
AUTHOR, OTHER = 1_500_000_042, 1_500_000_043
_ids = itertools.count(datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=3)), 4096)


def post(author: int) -> Post:
    number = next(_ids)
    payload = {"data": {"id": str(number), "author_id": str(author), "edit_history_tweet_ids": [str(number)]}}
    return Post(number, author, "some text", datetime.now(UTC), payload=payload)


@pytest.fixture
def settings(fresh_postgres_url: str, tmp_path: Path) -> Settings:
    return load_settings(database_url=fresh_postgres_url, overtone_home=tmp_path / "home", erasure_signing_key=SIGNING)


async def fill(db: Database, posts: list[Post]) -> None:
    for start in range(0, len(posts), 2_000):
        part = posts[start : start + 2_000]
        await write_posts(db, part, stream="filtered_stream")
        scores = {"positive": 0.7, "negative": 0.3}
        await write_predictions(db, [(one.post_id, Prediction("positive", 0.7, scores, "tiny-1")) for one in part])


async def mentions(db: Database, numbers: set[int]) -> list[str]:
    """The tables, partitions among them, with a row that names one of `numbers`; tombstones aside."""
    found = []
    async with db.acquire() as connection:
        tables = await connection.fetch(
            "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = 'overtone' AND c.relkind = 'r' AND c.relname NOT LIKE 'deleted%'"
        )
        for (name,) in tables:
            for (row,) in await connection.fetch(f"SELECT t::text FROM overtone.{name} t"):
                if any(str(number) in row for number in numbers):
                    found.append(name)
                    break
    return found


async def test_an_author_of_ten_thousand_posts_is_erased_and_stays_away(
    fresh_database: Database, settings: Settings
) -> None:
    theirs, others = [post(AUTHOR) for _ in range(10_000)], [post(OTHER) for _ in range(50)]
    await fill(fresh_database, theirs + others)
    for one in theirs[:20]:
        await write_dead_letter(
            fresh_database, b'{"post_id": "%d", "text": "x"}' % one.post_id, "x", post_id=one.post_id
        )
    await write_dead_letter(fresh_database, b'{"data": {"author_id": "%d", oops' % AUTHOR, "not_json")
    async with fresh_database.acquire() as connection:
        await connection.execute(
            "INSERT INTO overtone.feedback (post_id, label) SELECT unnest($1::bigint[]), 'neutral'",
            [one.post_id for one in theirs[:30]],
        )
    folder = settings.home / "snapshots" / "2026"
    folder.mkdir(parents=True)
    rows = [json.dumps({"post_id": str(one.post_id), "text": one.text}) + "\n" for one in theirs[:99] + others[:1]]
    (folder / "train.jsonl").write_text("".join(rows))

    async with asyncio.timeout(60):
        receipt = await open_eraser(settings, fresh_database).erase("author", AUTHOR, actor="test")

    body = verify(receipt, public_key(signing_key(settings)))
    assert body["removed"] == {
        "posts": 10_000,
        "predictions": 10_000,
        "feedback": 30,
        "dead_letters": 21,
        "lines_of_files": 99,
    }
    assert set(body["left"].values()) == {0}
    assert body["posts"] == {"count": 10_000, "sha256": digest_of([one.post_id for one in theirs])}
    assert await mentions(fresh_database, {AUTHOR, theirs[0].post_id, theirs[-1].post_id}) == []
    assert (folder / "train.jsonl").read_text() == rows[-1]
    # What a search over the whole span would bring, and a post that had not been seen.
    assert await write_posts(fresh_database, [*theirs, *others, post(AUTHOR)], stream="filtered_stream_search") == 0
    [entry] = await read_audit(fresh_database, action="author.erased")
    assert (entry.actor, entry.subject, entry.detail["posts"]) == ("test", body["receipt_id"], 10_000)
    assert entry.detail["signature"] == receipt["signature"]


async def test_erasing_twice_and_what_is_not_stored(fresh_database: Database, settings: Settings) -> None:
    eraser = open_eraser(settings, fresh_database)
    one = post(AUTHOR)
    for _ in range(2):
        receipt = await eraser.erase("post", one.post_id, actor="test")
        assert set(receipt["body"]["removed"].values()) == {0}
    assert await write_posts(fresh_database, [one], stream="s") == 0
    for number in (0, -1, 2**63):
        with pytest.raises(InvalidInputError):
            await eraser.erase("author", number, actor="test")


@pytest.fixture
async def api(fresh_database: Database, settings: Settings, fresh_postgres_url: str) -> Any:
    store = Store(fresh_postgres_url, eraser_for=lambda db: open_eraser(settings, db))
    service = Service(classifier=None, gate=Gate(KeyRing(store)), records=store)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await store.close()


async def test_the_api_erases_for_administrators(
    api: httpx.AsyncClient, fresh_database: Database, settings: Settings
) -> None:
    posts = [post(AUTHOR) for _ in range(3)]
    await fill(fresh_database, posts)
    key_id, admin = await create_key(fresh_database, "a", ["admin"], actor="test")
    _, reader = await create_key(fresh_database, "r", ["read"], actor="test")
    assert (await api.delete(f"/posts/{posts[0].post_id}")).status_code == 401
    assert (await api.delete(f"/posts/{posts[0].post_id}", headers={"X-API-Key": reader})).status_code == 403
    for path in ("/posts/x", "/posts/-1", "/posts/0", "/authors/" + "9" * 20, "/posts/%D9%A1"):
        assert (await api.delete(path, headers={"X-API-Key": admin})).status_code == 422
    answer = await api.delete(f"/posts/{posts[0].post_id}", headers={"X-API-Key": admin})
    body = verify(answer.json(), public_key(signing_key(settings)))
    assert (body["removed"]["posts"], body["actor"], answer.headers["cache-control"]) == (1, key_id, "no-store")
    answer = await api.delete(f"/authors/{AUTHOR}", headers={"X-API-Key": admin})
    assert answer.json()["body"]["removed"]["posts"] == 2


@pytest.fixture
def command(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    assert settings.database_url
    monkeypatch.setenv("DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("OVERTONE_HOME", str(settings.home))
    monkeypatch.setenv("ERASURE_SIGNING_KEY", SIGNING)
    runner = CliRunner()

    def run(*arguments: str) -> Any:
        return runner.invoke(app, list(arguments))

    return run


def test_the_command_erases_exports_and_verifies(command: Any, fresh_postgres_url: str, tmp_path: Path) -> None:
    posts = [post(AUTHOR) for _ in range(3)]

    async def prepare() -> None:
        db = await Database.open(fresh_postgres_url)
        await fill(db, posts)
        await db.close()

    asyncio.run(prepare())
    written = tmp_path / "theirs.jsonl"
    assert command("export", "author", str(AUTHOR), "-o", str(written)).exit_code == 0
    exported = [json.loads(line) for line in written.read_text().splitlines()]
    assert [one["post_id"] for one in exported] == [one.post_id for one in posts]
    assert exported[0]["predictions"][0]["label"] == "positive"
    shown = json.loads(command("erase", "author", str(AUTHOR), "--dry-run", "--json").stdout)
    assert shown["would_remove"]["posts"] == 3
    file = tmp_path / "receipt.json"
    assert command("erase", "author", str(AUTHOR), "--yes", "--receipt", str(file)).exit_code == 0
    assert (
        json.loads(command("erase", "author", str(AUTHOR), "--dry-run", "--json").stdout)["would_remove"]["posts"] == 0
    )
    checked = command("erase", "verify", str(file), "--json")
    assert (checked.exit_code, json.loads(checked.stdout)["body"]["removed"]["posts"]) == (0, 3)
    file.write_text(file.read_text().replace(str(AUTHOR), str(OTHER)))
    assert isinstance(command("erase", "verify", str(file)).exception, DataError)
    again = json.loads(command("erase", "post", str(posts[0].post_id), "--yes", "--json").stdout)
    assert again["body"]["kind"] == "post"
