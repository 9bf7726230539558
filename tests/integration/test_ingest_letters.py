"""Dead letters: looked through, tried again, dropped."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from ingest.classify import NOT_CLASSIFIED
from ingest.letters import Fate, Retrier, post_in
from ingest.predict import Outcome, Postponed, PredictClient, Refused
from overtone.cli.app import app
from overtone.db import Database
from overtone.db.letters import Choice, chosen_letters, count_letters, drop_letters, newest_letters
from overtone.db.payload import raw_of
from overtone.db.posts import are_stored, write_dead_letter, write_posts
from overtone.db.tombstones import bury_authors
from overtone.schema import Post, Prediction, datetime_to_snowflake

NOW = datetime.now(UTC) - timedelta(minutes=1)
FIRST = datetime_to_snowflake(NOW)
GOOD = Prediction("neutral", 0.7, {"negative": 0.1, "neutral": 0.7, "positive": 0.2}, "m-1")


class Judge(PredictClient):
    """Answers what the text says."""

    def __init__(self) -> None:
        super().__init__("http://unused", "X", lambda: "k")

    async def predict(self, texts: Sequence[str]) -> list[Outcome]:
        known: dict[str, Outcome] = {"no": Refused("too_large"), "later": Postponed("overloaded")}
        return [known.get(text, GOOD) for text in texts]


def post(number: int, **more: Any) -> Post:
    payload = {"data": {"id": str(FIRST + number), "text": "x", "lang": "en"}, "matching_rules": [{"tag": "t"}]}
    fields = {"author_id": 5, "text": "x", "created_at": NOW, "lang": "en", "rule_tags": ("t",), "payload": payload}
    return Post(post_id=FIRST + number, **{**fields, **more})


def refused_text(number: int, text: str) -> bytes:
    return json.dumps({"post_id": str(FIRST + number), "text": text}).encode()


async def retried(db: Database, choice: Choice = Choice()) -> list[Fate]:  # noqa: B008  frozen
    fates: list[Fate] = []
    await Retrier(db, Judge()).retry(choice, lambda _, fate: fates.append(fate))
    return fates


def test_a_post_comes_back_out_of_its_letter_as_it_was() -> None:
    original = post(1, text="half \ud83d pair", author_id=7)
    again = post_in(raw_of(original))
    assert again is not None
    assert raw_of(again) == raw_of(original)
    assert (again.lang, again.rule_tags) == ("en", ("t",))
    assert post_in(b"\xff not json") is None
    assert post_in(b'{"post_id": 1}') is None


async def test_what_can_be_stored_now_is(fresh_database: Database) -> None:
    db = fresh_database
    line = json.dumps({"data": {"id": str(FIRST), "text": "now it can be read"}}).encode()
    await write_dead_letter(db, line, "not_json")
    await write_dead_letter(db, raw_of(post(1)), "PostgreSQL refuses a value", post_id=FIRST + 1)
    await write_dead_letter(db, raw_of(post(2, author_id=9)), "PostgreSQL refuses a value", post_id=FIRST + 2)
    await write_dead_letter(db, b"garbage", "not_json")
    await bury_authors(db, [9], reason="asked")
    assert await retried(db) == [Fate.STORED, Fate.STORED, Fate.ERASED, Fate.REFUSED]
    assert await are_stored(db, [FIRST, FIRST + 1])
    left = await newest_letters(db, Choice(), limit=9)
    assert [(one.raw, one.attempts, one.reason) for one in left] == [(b"garbage", 2, "not_json")]


async def test_what_postgres_refuses_again_stays_once(fresh_database: Database) -> None:
    impossible = post(-FIRST - 5)
    await write_posts(fresh_database, [impossible], stream="s")
    assert await retried(fresh_database) == [Fate.REFUSED]
    assert [one.attempts for one in await newest_letters(fresh_database, Choice(), limit=9)] == [2]


async def test_what_the_api_refused_is_asked_again(fresh_database: Database) -> None:
    db = fresh_database
    await write_posts(db, [post(1), post(2), post(3)], stream="s")
    for number, text in ((1, "fine"), (2, "no"), (3, "later"), (4, "its post is gone")):
        await write_dead_letter(db, refused_text(number, text), f"{NOT_CLASSIFIED}x", post_id=FIRST + number)
    assert await retried(db) == [Fate.CLASSIFIED, Fate.REFUSED, Fate.POSTPONED, Fate.ERASED]
    assert await count_letters(db, Choice()) == {f"{NOT_CLASSIFIED}too_large": 1, f"{NOT_CLASSIFIED}x": 1}
    async with db.acquire() as connection:
        rows = await connection.fetch("SELECT post_id, model_version FROM overtone.predictions")
    assert [tuple(row) for row in rows] == [(FIRST + 1, "m-1")]


async def test_letters_are_chosen_by_number_reason_and_age(fresh_database: Database) -> None:
    db = fresh_database
    for number in range(5):
        await write_dead_letter(db, b"%d" % number, "odd" if number % 2 else "even")
    ids = [one.letter_id for one in await chosen_letters(db, Choice(), limit=9)]
    assert [one.raw for one in await chosen_letters(db, Choice(tuple(ids[:3]), "ev"), limit=9)] == [b"0", b"2"]
    assert await count_letters(db, Choice(before=NOW)) == {}
    assert await drop_letters(db, Choice(reason="odd"), actor="cli:x") == 2
    assert await count_letters(db, Choice()) == {"even": 3}
    async with db.acquire() as connection:
        assert await connection.fetchval("SELECT detail::text FROM overtone.audit_log") == '{"letters": 2}'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, fresh_postgres_url: str, tmp_path: Any) -> Any:
    monkeypatch.setenv("DATABASE_URL", fresh_postgres_url)
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path))

    def invoke(*words: str) -> Any:
        return CliRunner().invoke(app, ["dead-letters", *words], standalone_mode=False)

    return invoke


def test_the_commands(run: Any, fresh_postgres_url: str) -> None:
    import asyncio

    async def fill() -> None:
        db = await Database.open(fresh_postgres_url, max_size=1)
        await write_dead_letter(db, b"secret words", "not_json")
        await db.close()

    asyncio.run(fill())
    listed = json.loads(run("list", "--json").stdout)
    assert listed["reasons"] == {"not_json": 1}
    assert "secret" not in run("list").stdout
    number = str(listed["letters"][0]["letter_id"])
    assert json.loads(run("show", number, "--json").stdout)["raw"] == "secret words"
    assert "Would retry 1" in run("retry", "--all", "--dry-run").stdout
    assert json.loads(run("retry", number, "--json").stdout)["refused"] == 1
    assert json.loads(run("drop", "--reason", "not_json", "--dry-run", "--json").stdout)["letters"] == 1
    assert run("drop").exception is not None
    assert "Dropped 1" in run("drop", "--all", "--yes").stdout
    assert run("show", number).exception is not None
