"""Uploads of jobs: taken apart line by line within bounds, and told what is wrong without a word of theirs."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.errors import InvalidInputError, MalformedError, TooLargeError
from overtone.job_files import JobFolder
from serve import uploads
from serve.uploads import CHUNK_LINES, Upload, UploadOptions, take_in

SECRET = "hush-hush"


def taken(root: Path, body: bytes, options: UploadOptions, *, step: int = 7) -> tuple[Upload, list[dict[str, object]]]:
    """What is taken in of `body`, which comes in pieces of `step` bytes, and the rows in the files."""
    folder = JobFolder(root, uuid4())
    folder.make()
    upload = take_in((body[at : at + step] for at in range(0, len(body), step)), folder, options)
    return upload, [row for number in range(1, len(upload.chunks) + 1) for row in folder.read_input(number)]


def test_lines_of_json_keep_their_numbers_and_ids(tmp_path: Path) -> None:
    rows = '{"text": "für", "id": "a-1", "post_id": "17", "other": [1]}\r\n{"text": "x", "id": 3}'.encode()
    body = b'\xef\xbb\xbf"love"\n\n' + rows
    upload, found = taken(tmp_path, body, UploadOptions("ndjson"))
    assert found == [
        {"line": 1, "text": "love"},
        {"line": 3, "id": "a-1", "post_id": "17", "text": "für"},
        {"line": 4, "id": 3, "text": "x"},
    ]
    assert (upload.chunks, upload.wrong, upload.problems) == ([3], 0, [])


@pytest.mark.parametrize(("form", "mark"), [("csv", ","), ("tsv", "\t")])
def test_columns_are_found_by_their_names(tmp_path: Path, form: uploads.Format, mark: str) -> None:
    rows = [["author_id", "said", "n"], ["42", '"two\nlines, ""quoted"""', "1"], ["", "plain", "2"], [""], ["7"]]
    body = "\r\n".join(mark.join(row) for row in rows).encode()
    _, found = taken(tmp_path, body, UploadOptions(form, column="said"))
    assert found[:2] == [
        {"line": 2, "author_id": "42", "text": 'two\nlines, "quoted"'},
        {"line": 4, "text": "plain"},
    ]
    assert [row["line"] for row in found[2:]] == [6]
    assert found[2]["error"] == {"code": "invalid_input", "detail": "said is missing: the row is short."}


def test_what_is_wrong_is_named_by_line_and_field_and_never_shown(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "good"}),
        f'{{"text": "{SECRET}"',
        json.dumps({"words": SECRET}),
        json.dumps({"text": SECRET, "post_id": "-3"}),
        json.dumps({"text": SECRET * 3000}),
        json.dumps({"text": "  "}),
        json.dumps([SECRET]),
        json.dumps({"text": SECRET, "id": ["x"]}),
    ]
    body = "\n".join(lines).encode()
    upload, rows = taken(tmp_path, body, UploadOptions("ndjson"), step=1000)
    wrong = [(item["line"], item["field"]) for item in upload.problems]
    assert wrong == [(2, "line"), (3, "text"), (4, "post_id"), (5, "text"), (6, "text"), (7, "text"), (8, "id")]
    assert upload.problems[3]["limit"] == 25_000
    assert upload.problems[3]["size"] == len(SECRET) * 3000
    assert (upload.wrong, len(rows)) == (7, 8)
    assert SECRET not in json.dumps([upload.problems, rows])
    with pytest.raises(InvalidInputError, match="7 of 8 lines are wrong; line 2, line: is not valid JSON") as caught:
        taken(tmp_path, body, UploadOptions("ndjson", rejects=True), step=1000)
    assert SECRET not in str(caught.value)
    assert caught.value.details["errors"][0].field == "line 2, line"


@pytest.mark.parametrize(
    ("body", "options", "error", "words"),
    [
        (b"", UploadOptions("ndjson"), InvalidInputError, "at least 1 line"),
        (b"text\n", UploadOptions("csv"), InvalidInputError, "at least 1 line"),
        (b"hush-hush,1\n", UploadOptions("csv"), InvalidInputError, "^text must be the name of one column"),
        (b"text,text\nx,y\n", UploadOptions("csv"), InvalidInputError, "which names 2 columns"),
        (b'text\n"' + b"x" * 200_000, UploadOptions("csv"), MalformedError, "^Line 2 is not valid CSV"),
        (b"text\n" + b"x" * 400_000, UploadOptions("csv"), TooLargeError, "^Line 2 is over the limit of 327680 bytes"),
        (b'"x"\n' * 9, UploadOptions("ndjson", max_texts=8), TooLargeError, "limit of 8 lines"),
        (b'"x"\n' * 9, UploadOptions("ndjson", max_bytes=8), TooLargeError, "limit of 8 bytes"),
        (b"{}\n[]\n", UploadOptions("ndjson"), InvalidInputError, "2 of 2 lines are wrong"),
        (b"text\n\xff\xfe\n", UploadOptions("csv"), InvalidInputError, "half of a surrogate pair"),
    ],
)
def test_an_upload_that_cannot_be_taken_says_why(
    tmp_path: Path, body: bytes, options: UploadOptions, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        taken(tmp_path, body, options, step=5000)
    assert "hush" not in str(caught.value)


def test_a_long_upload_is_held_one_chunk_at_a_time(tmp_path: Path) -> None:
    lines = CHUNK_LINES * 3 + 1
    folder = JobFolder(tmp_path, uuid4())
    folder.make()
    seen: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(lines):
            yield b'"text %d"\n' % number
            seen.append(len(list((folder.path / "input").iterdir())))

    upload = take_in(pieces(), folder, UploadOptions("ndjson"))
    assert upload.chunks == [CHUNK_LINES, CHUNK_LINES, CHUNK_LINES, 1]
    assert (seen[CHUNK_LINES - 2], seen[CHUNK_LINES], seen[-1]) == (0, 1, 3)
    assert folder.read_input(4) == [{"line": lines, "text": f"text {lines - 1}"}]


def test_long_texts_make_shorter_chunks(tmp_path: Path) -> None:
    upload, _ = taken(tmp_path, (json.dumps("x" * 20_000) + "\n").encode() * 120, UploadOptions("ndjson"), step=65_536)
    assert upload.chunks == [50, 50, 20]


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50), max_size=30
    ),
    step=st.integers(1, 60),
)
def test_whatever_the_texts_each_line_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], step: int
) -> None:
    texts = [*texts, "one that is good"]
    body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    _, rows = taken(tmp_path_factory.mktemp("any"), body, UploadOptions("ndjson"), step=step)
    assert [row["line"] for row in rows] == list(range(1, len(texts) + 1))
    assert [row.get("text") for row in rows] == [text if text and not text.isspace() else None for text in texts]
