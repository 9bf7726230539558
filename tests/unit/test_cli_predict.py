"""Files of texts in, lines of predictions out, and going on where an output ends."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ingest.predict import Outcome, Postponed
from overtone.cli.predict import RemotePredictor, _in_order, as_record
from overtone.cli.rows import Begun, Unreadable, find_end, open_rows, skip_done
from overtone.errors import ConfigurationError, InvalidInputError, OverloadedError, UnavailableError
from overtone.schema import Prediction

GOOD = Prediction("positive", 0.91234567, {"negative": 0.05, "positive": 0.91234567}, "m-1")


class Scripted:
    """A client whose answers are given: outcomes, or an exception to raise."""

    def __init__(self, *answers: list[Outcome] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    async def predict(self, texts: Sequence[str]) -> list[Outcome]:
        self.asked.append(list(texts))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Echo:
    """Labels each text with itself."""

    async def classify(self, texts: Sequence[str]) -> list[Outcome]:
        return [Prediction(text, 1.0, {text: 1.0}, "m-1") for text in texts]


def rows_of(path: Path, column: str = "text") -> list[object]:
    with open_rows(str(path), column) as file:
        return list(file.rows())


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = written(tmp_path / "in.csv", b'\xef\xbb\xbfid,text\r\n1,"a, b"\r\n2,"two\nlines"\r\n3\r\n')
    assert rows_of(path) == ["a, b", "two\nlines", Unreadable("the row is too short")]


def test_tsv(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "in.tsv", b"label\tmessage\n1\tx y\n"), "message") == ["x y"]


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="id, body"):
        rows_of(written(tmp_path / "in.csv", b"id,body\n1,x\n"))


def test_jsonl_takes_objects_and_strings(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", b'{"text": "a"}\n\n"b"\nnope\n{"x": 1}\n5\n')
    assert rows_of(path) == [
        "a",
        "b",
        Unreadable("the line is not JSON"),
        Unreadable("the object has no field 'text'"),
        5,
    ]


def test_txt_keeps_blank_lines_so_that_rows_are_lines(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "in.txt", "a\r\n\né\n".encode())) == ["a", "", "é"]


def test_an_unknown_format_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\.csv"):
        rows_of(written(tmp_path / "in.parquet", b""))
    with pytest.raises(ConfigurationError, match="No such file"):
        rows_of(tmp_path / "absent.csv")


def line(number: int, text: str) -> str:
    return json.dumps(as_record(number, text, GOOD)) + "\n"


def test_no_output_yet_is_a_beginning(tmp_path: Path) -> None:
    assert find_end(tmp_path / "absent.jsonl") == Begun()
    assert find_end(written(tmp_path / "empty.jsonl", b"")) == Begun()


def test_a_line_cut_off_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(line(0, "a") + line(1, "b") + line(2, "c")[:-5])
    assert find_end(path) == Begun(2, "b")
    assert path.read_text() == line(0, "a") + line(1, "b")


def test_an_output_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "notes.txt", b"my notes\n")
    with pytest.raises(ConfigurationError, match="no output of this command"):
        find_end(path)
    assert path.read_text() == "my notes\n"


def test_rows_done_are_skipped(tmp_path: Path) -> None:
    rows = iter(["a", "b", "c"])
    skip_done(rows, Begun(2, "b"), tmp_path / "out.jsonl")
    assert list(rows) == ["c"]


@pytest.mark.parametrize("begun", [Begun(2, "other"), Begun(5, None)])
def test_an_output_of_another_input_is_refused(tmp_path: Path, begun: Begun) -> None:
    with pytest.raises(ConfigurationError, match="made from another"):
        skip_done(iter(["a", "b", "c"]), begun, tmp_path / "out.jsonl")


async def test_rows_stay_in_order_and_bad_ones_fail_alone() -> None:
    rows = [f"t{number}" for number in range(1000)]
    rows[3] = ""
    found = [item async for item in _in_order(Echo(), iter([*rows, 7, Unreadable("the line is not JSON")]), 10)]
    assert [number for number, _, _ in found] == list(range(10, 1012))
    assert [outcome.label for _, _, outcome in found if isinstance(outcome, Prediction)] == [row for row in rows if row]
    problems = {number: outcome.problem for number, _, outcome in found if isinstance(outcome, Unreadable)}
    assert problems == {
        13: "the text must hold at least 1 character",
        1010: "the text must be a string",
        1011: "the line is not JSON",
    }


def test_a_record_is_rounded_and_an_error_holds_no_text() -> None:
    assert as_record(4, "x", GOOD)["confidence"] == 0.912346
    assert as_record(4, "x", Unreadable("why")) == {"row": 4, "error": "why"}


async def test_only_what_was_postponed_is_asked_again() -> None:
    client = Scripted([GOOD, Postponed("overloaded")], OverloadedError(), [GOOD])
    outcomes = await RemotePredictor(client, first_wait_s=0.0).classify(["a", "b"])  # type: ignore[arg-type]
    assert outcomes == [GOOD, GOOD]
    assert client.asked == [["a", "b"], ["b"], ["b"]]


async def test_an_api_that_stays_away_is_told() -> None:
    client = Scripted(*[UnavailableError()] * 20)
    with pytest.raises(UnavailableError):
        await RemotePredictor(client, first_wait_s=0.0).classify(["a"])  # type: ignore[arg-type]
