"""Feedback as training data: what may be learned from, and what an erasure takes out of it."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from overtone.cli.database import with_database
from overtone.db import Database
from overtone.db.embedded import EmbeddedPostgres, running_url
from overtone.db.feedback import Feedback, write_feedback
from overtone.db.posts import write_posts
from overtone.db.tombstones import bury_authors
from overtone.erasure import open_eraser
from overtone.errors import ConfigurationError, DataError
from overtone.schema import LABELS, Post, datetime_to_snowflake
from overtone.settings import Settings, load_settings
from train.__main__ import app
from train.data import build_split
from train.feedback import read_feedback, require_not_erased
from train.snapshot import HALVES, write_snapshot
from train.sources import read_rows

FIRST = datetime_to_snowflake(datetime.now(UTC) - timedelta(hours=3))

T = TypeVar("T")


class Place:
    """A database with feedback, and the settings that find it."""

    def __init__(self, url: str, home: Path) -> None:
        self.url = url
        self.settings = load_settings(overtone_home=home, database_url=url, allow_training_on_x_content=True)

    def do(self, work: Callable[[Database], Awaitable[T]]) -> T:
        return with_database(self.settings, work)

    def erase(self, author_id: int) -> None:
        self.do(lambda db: open_eraser(self.settings, db).remove([], [author_id], reason="requested"))

    def snapshot(self) -> Path:
        """What a run would keep of the feedback, with three texts to validate on."""
        feedback, _ = read_feedback(self.settings, LABELS)
        file = self.settings.home / "validation.tsv"
        file.write_text("label\ttext\n" + "".join(f"{label}\tkept apart {label}\n" for label in LABELS))
        validation = read_rows(file, LABELS)
        split = build_split([feedback], validation, LABELS)
        return write_snapshot(self.settings.home / "snapshots", split, [feedback, validation], LABELS)


@pytest.fixture
def place(fresh_postgres_url: str, tmp_path: Path) -> Place:
    place = Place(fresh_postgres_url, tmp_path)

    async def fill(db: Database) -> None:
        posts = [
            Post(FIRST + number, author, f"post {number} of {author} {'word ' * number}", datetime.now(UTC))
            for number, author in enumerate((7, 8, 8, 9))
        ]
        await write_posts(db, posts, stream="s")
        items = [Feedback("neutral", post_id=one.post_id, annotator="ann") for one in posts]
        items += [Feedback(label, text=f"by hand {label}") for label in LABELS]
        await write_feedback(db, items, key_id="k")
        await write_feedback(db, [Feedback("splendid", text="another label")], key_id="k")

    place.do(fill)
    return place


def authors_in(snapshot: Path) -> set[Any]:
    return set(pq.read_table(snapshot / HALVES[0])["author_id"].to_pylist())


def test_feedback_becomes_rows(place: Place) -> None:
    rows, unusable = read_feedback(place.settings, LABELS)
    assert len(rows.rows) == 7
    assert {row.annotator for row in rows.rows} == {"k/ann", "k/"}
    assert {row.author_id for row in rows.rows} == {7, 8, 9, None}
    assert [str(one) for one in unusable] == [
        f"feedback: 1 row: label 'splendid' is not one of {', '.join(LABELS)} (line 8)"
    ]


def test_posts_join_only_where_that_is_allowed(place: Place) -> None:
    careful = place.settings.model_copy(update={"allow_training_on_x_content": False})
    rows, _ = read_feedback(careful, LABELS)
    assert {(row.text, row.post_id) for row in rows.rows} == {(f"by hand {label}", None) for label in LABELS}
    assert not Settings.model_fields["allow_training_on_x_content"].default


def test_an_erased_author_is_in_no_snapshot(place: Place) -> None:
    before = place.snapshot()
    assert authors_in(before) == {7, 8, 9, None}
    place.erase(8)
    after = place.snapshot()
    assert authors_in(after) == {7, 9, None}
    assert after != before
    assert authors_in(before) == {7, 9, None}
    # A tombstone is enough: the posts themselves may not be gone yet.
    place.do(lambda db: bury_authors(db, [9], reason="requested"))
    assert authors_in(place.snapshot()) == {7, None}


def test_an_author_who_is_erased_while_rows_are_read_stops_the_run(place: Place) -> None:
    feedback, _ = read_feedback(place.settings, LABELS)
    place.erase(8)
    snapshot = place.settings.home / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    columns = {name: [getattr(row, name) for row in feedback.rows] for name in ("text", "post_id", "author_id")}
    pq.write_table(pa.table(columns), snapshot / HALVES[0])
    with pytest.raises(DataError, match="2 posts were erased"):
        require_not_erased(place.settings, feedback.rows, snapshot)
    assert authors_in(snapshot) == {7, 9, None}
    again, _ = read_feedback(place.settings, LABELS)
    require_not_erased(place.settings, again.rows, snapshot)


def test_without_feedback_or_a_database_there_is_nothing_to_train_on(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        read_feedback(load_settings(overtone_home=tmp_path, database_url=None), LABELS)

    async def forget(db: Database) -> None:
        async with db.acquire() as connection:
            await connection.execute("DELETE FROM overtone.feedback")

    place.do(forget)
    with pytest.raises(DataError, match="no feedback"):
        read_feedback(place.settings, LABELS)


def test_the_database_of_a_home_is_found(embedded_postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    folder = Path(embedded_postgres.log_file).with_suffix("")
    assert running_url(folder) == embedded_postgres.url
    assert running_url(tmp_path) is None


@pytest.mark.parametrize(("given", "missing"), [("--output", "--from-feedback"), ("--train", "--register")])
def test_a_run_needs_something_to_train_on_and_a_place_for_the_bundle(given: str, missing: str) -> None:
    answer = CliRunner().invoke(app, ["--config", "x.yaml", "--validation", "v.tsv", given, "here"])
    assert (answer.exit_code, missing in answer.output) == (2, True)


def test_the_command_reads_feedback_beside_a_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place.settings.home
    monkeypatch.setenv("DATABASE_URL", place.url)
    monkeypatch.setenv("OVERTONE_HOME", str(home))
    for name, text in (("train", "written down"), ("validation", "kept apart")):
        (home / f"{name}.tsv").write_text("label\ttext\n" + "".join(f"{one}\t{text} {one}\n" for one in LABELS))
    (home / "run.yaml").write_text("name: run\n")
    # The run ends at a folder that holds something else: all that is read is read by then.
    (home / "taken").mkdir()
    (home / "taken" / "letter").write_text("mine")
    files = {"config": "run.yaml", "train": "train.tsv", "validation": "validation.tsv", "output": "taken"}
    words = [word for name, file in files.items() for word in (f"--{name}", str(home / file))]
    answer = CliRunner().invoke(app, [*words, "--from-feedback"])
    assert answer.exit_code != 0
    assert "6 training texts, 3 validation texts" in answer.output
    assert "label 'splendid' is not one of" in answer.output
    [snapshot] = (home / "snapshots").iterdir()
    assert authors_in(snapshot) == {None}
