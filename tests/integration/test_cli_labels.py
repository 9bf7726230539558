"""`overtone labels`: posts out, labels in, and nothing in when something is wrong."""

import asyncio
import csv
import io
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner

from overtone.cli.app import app
from overtone.cli.label_files import read_labels
from overtone.db import Database
from overtone.db.posts import write_posts
from overtone.db.predictions import write_predictions
from overtone.errors import ConfigurationError, InvalidInputError
from overtone.schema import LABELS, Post, Prediction, datetime_to_snowflake

FIRST = datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=3))
TEXTS = ("=secret\nwords", "calm, words")

T = TypeVar("T")


@pytest.fixture
def on_database(fresh_postgres_url: str) -> Callable[[Callable[[Database], Awaitable[Any]]], Any]:
    async def opened(work: Callable[[Database], Awaitable[T]]) -> T:
        db = await Database.open(fresh_postgres_url, max_size=1)
        try:
            return await work(db)
        finally:
            await db.close()

    return lambda work: asyncio.run(opened(work))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, fresh_postgres_url: str, tmp_path: Path, on_database: Any) -> Any:
    monkeypatch.setenv("DATABASE_URL", fresh_postgres_url)
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path))

    async def fill(db: Database) -> None:
        posts = [Post(FIRST + number, 7, text, datetime.now(UTC)) for number, text in enumerate(TEXTS)]
        await write_posts(db, posts, stream="s")
        scores = {"positive": 0.4, "neutral": 0.3, "negative": 0.3}
        await write_predictions(db, [(one.post_id, Prediction("positive", 0.4, scores, "m-1")) for one in posts])

    on_database(fill)
    return lambda *words: CliRunner().invoke(app, ["labels", *map(str, words)], standalone_mode=False)


@pytest.fixture
def labels(on_database: Any) -> Callable[[], list[tuple[Any, ...]]]:
    async def read(db: Database) -> list[tuple[Any, ...]]:
        async with db.acquire() as connection:
            rows = await connection.fetch(
                "SELECT post_id, text, label, annotator, source FROM overtone.feedback ORDER BY post_id, text"
            )
        return [tuple(row) for row in rows]

    return lambda: on_database(read)  # type: ignore[no-any-return]


def test_what_is_exported_comes_back_labelled(run: Any, labels: Any, tmp_path: Path) -> None:
    path = tmp_path / "to-label.csv"
    assert json.loads(run("export", "--output", path, "--json").stdout) == {"posts": 2, "reasons": {"uncertain": 2}}
    assert path.stat().st_mode & 0o777 == 0o600
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(row["post_id"], row["text"]) for row in rows] == [
        (str(FIRST), "'=secret words"),
        (str(FIRST + 1), "calm, words"),
    ]
    assert isinstance(run("export", "--output", path).exception, ConfigurationError)
    path.write_text(path.read_text().replace(f"{FIRST},,,", f"{FIRST}, neutral ,,"))
    for state in ("created", "unchanged"):
        told = json.loads(run("import", path, "--annotator", "ann", "--json").stdout)
        assert (told["rows"], told["unlabelled"], told[state], told["wrong"]) == (2, 1, 1, [])
    assert labels() == [(FIRST, None, "neutral", "ann", "import")]
    lines = [json.loads(line) for line in run("export", "--json").stdout.splitlines()]
    assert [(line["post_id"], line["label"], line["reason"]) for line in lines] == [(str(FIRST + 1), "", "uncertain")]


def test_nothing_is_stored_when_a_row_is_wrong(run: Any, labels: Any, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows: list[Any] = [
        {"post_id": FIRST, "label": "negative"},
        {"post_id": str(FIRST + 9), "label": "negative"},
        {"text": "secret words", "label": "splendid secret", "annotator": "a" * 201},
        {"text": "good", "label": "positive"},
        {"label": ["positive"], "post_id": [1]},
        ["secret"],
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\nsecret\n")
    answer = run("import", path, "--json")
    told = json.loads(answer.stdout)
    assert [(one["line"], one["field"]) for one in told["wrong"]] == [
        (2, "post_id"),
        (3, "label"),
        (3, "annotator"),
        (5, "label"),
        (5, "post_id"),
        (6, "row"),
        (7, "row"),
    ]
    assert (answer.return_value, told["bad"], "secret" in answer.output) == (3, 5, False)
    refusal = run("import", path).exception
    assert isinstance(refusal, InvalidInputError)
    assert "line 2, post_id: is not stored" in refusal.message
    assert "secret" not in refusal.message
    assert run("import", path, "--skip-bad", "--dry-run").stdout.startswith("Only checked: 7 rows")
    assert labels() == []
    assert "2 created" in run("import", path, "--skip-bad").stdout
    assert labels() == [(FIRST, None, "negative", "", "import"), (None, "good", "positive", "", "import")]


def test_rows_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(
        b'\xef\xbb\xbfannotator,label,text\nann,positive,"two\nlines"\nbob,positive,\xff\nann,negative,"two\nlines"\n'
        b"\nann,neutral\n,neutral,fine\n"
    )
    found = read_labels(path, LABELS)
    assert [(one.line, one.field) for one in found.wrong] == [(2, "label"), (4, "text"), (5, "label"), (8, "row")]
    assert [(one.line, one.item.text) for one in found.labelled] == [(9, "fine")]


@pytest.mark.parametrize("held", ["", "text\nx\n", "label\npositive\n"])
def test_a_file_without_the_columns_is_refused(tmp_path: Path, held: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(held)
    with pytest.raises(InvalidInputError, match="line 1"):
        read_labels(path, LABELS)
    for other in (tmp_path / "none.csv", tmp_path / "labels.xlsx"):
        with pytest.raises(ConfigurationError):
            read_labels(other, LABELS)
