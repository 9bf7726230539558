"""Reading labelled texts of every kind of file, and telling what is wrong with them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overtone.errors import DataError
from train.sources import Finding, read_rows

NAMES = ("negative", "neutral", "positive")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tsv(folder: Path, *rows: str) -> Path:
    return written(folder, "data.tsv", "\n".join(["label\ttext", *rows]) + "\n")


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [
        {"label": "positive", "text": "good", "post_id": "17", "annotator": "ann"},
        {"label": "negative", "text": 'so "bad"', "post_id": "", "annotator": ""},
    ]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{**row, "post_id": int(row["post_id"] or 0) or None} for row in rows]), path
        )
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        path.write_text('label,text,post_id,annotator\npositive,good,17,ann\nnegative,"so ""bad""",,\n')
    else:
        path.write_text('label\ttext\tpost_id\tannotator\npositive\tgood\t17\tann\nnegative\tso "bad"\t\t\n')
    found = read_rows(path, NAMES)
    assert [(row.label, row.text, row.post_id, row.annotator) for row in found.rows] == [
        ("positive", "good", 17, "ann"),
        ("negative", 'so "bad"', None, ""),
    ]
    assert len(found.sha256) == 64


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "data.tsv", "\ufefflabel\ttext\r\npositive\tgood\r\nnegative\tbad\r\n")
    assert [row.text for row in read_rows(path, NAMES).rows] == ["good", "bad"]


def test_a_text_of_several_lines_keeps_the_count_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "data.csv", 'label,text\npositive,"a\nb"\nhappy,c\n')
    with pytest.raises(DataError, match=r"\(line 4\)"):
        read_rows(path, NAMES)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["happy\tfine", "neutral\tok"], r"1 row: label 'happy' is not one of negative, neutral, positive \(line 2\)"),
        (["a long secret sentence\tneutral"], r"1 row: the label is not one of negative"),
        (["neutral\tok", "positive\t  "], r"the text is empty \(line 3\)"),
        (["neutral\tok", "positive"], r"1 columns where the header has 2 \(line 3\)"),
        (["neutral\ta\tb", "positive\tx"], r"3 columns where the header has 2 \(line 2\)"),
        (["neutral\t" + "a" * 25_001], r"the text is over 25000 characters \(line 2\)"),
        ([], r"holds no rows"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path: Path, rows: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        read_rows(tsv(tmp_path, *rows), NAMES)
    assert "secret" not in caught.value.message


def test_all_flaws_are_told_at_once_the_most_frequent_first(tmp_path: Path) -> None:
    rows = ["positive\t", *["neutral\tsecret words\textra"] * 40, "happy\tx"]
    with pytest.raises(DataError) as caught:
        read_rows(tsv(tmp_path, *rows), NAMES)
    first, *others = caught.value.message.splitlines()
    assert "40 rows: 3 columns where the header has 2 (lines 3, 4, 5, 6, 7 and 35 more)" in first
    assert len(others) == 2
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(("name", "line"), [("data.tsv", 3), ("data.csv", 3), ("data.jsonl", 2)])
def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, name: str, line: int) -> None:
    contents = {
        "data.tsv": b"label\ttext\nneutral\tok\npositive\tcaf\xe9\n",
        "data.csv": b"label,text\nneutral,ok\npositive,caf\xe9\n",
        "data.jsonl": b'{"label": "neutral", "text": "ok"}\n{"label": "positive", "text": "caf\xe9"}\n',
    }
    with pytest.raises(DataError, match=rf"1 row: not UTF-8 \(line {line}\)"):
        read_rows(written(tmp_path, name, contents[name]), NAMES)


@pytest.mark.parametrize(
    ("header", "told"), [("label\ttweet", "no column text"), ("", "no column label and no column")]
)
def test_a_missing_column_is_named(tmp_path: Path, header: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_rows(written(tmp_path, "data.tsv", f"{header}\nneutral\tok\n"), NAMES)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.jsonl", "{oops\n[1]\n", "1 row: not JSON"),
        ("data.parquet", "oops", "is not a Parquet file"),
        ("data.xlsx", "oops", r"name it \.tsv"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_rows(written(tmp_path, name, content), NAMES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.tsv: cannot be read \(FileNotFoundError\)"):
        read_rows(tmp_path / "nowhere.tsv", NAMES)


def test_a_finding_is_a_sentence() -> None:
    assert str(Finding("a.tsv", "x", (3,))) == "a.tsv: 1 row: x (line 3)"
