"""Files of jobs: whole or not there, and erased from by ids alone."""

from pathlib import Path
from uuid import uuid4

import orjson
import pytest

from overtone.erasure_files import erase_from_folder
from overtone.job_files import JobFolder, ids_of, job_folders


def lines(*rows: dict[str, object]) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "jobs", uuid4())
    folder.make()
    return folder


def test_results_come_in_the_order_of_the_upload(folder: JobFolder) -> None:
    for number in (2, 10, 1):
        folder.write_result(number, b"%d\n" % number)
    folder.write_result(2, b"two\n")
    assert b"".join(folder.results()) == b"1\ntwo\n10\n"
    assert [one.job_id for one in job_folders(folder.root)] == [folder.job_id]
    folder.drop()
    assert list(folder.results()) == []
    assert list(job_folders(folder.root)) == []


def test_texts_and_half_written_files_go_when_the_job_has_ended(folder: JobFolder) -> None:
    folder.write_input(1, lines({"line": 1, "text": "love"}))
    folder.write_result(1, b"{}\n")
    (folder.path / "result" / ".00000002.rows.abc").write_bytes(b"half")
    folder.drop_inputs()
    assert [path.name for path in folder.path.rglob("*") if path.is_file()] == ["00000001.rows"]
    with pytest.raises(FileNotFoundError):
        folder.read_input(1)


def test_nobody_else_can_read_them(folder: JobFolder) -> None:
    assert folder.path.stat().st_mode & 0o077 == 0


def test_an_erasure_takes_the_lines_that_name_the_post_and_no_others(folder: JobFolder) -> None:
    score = {"confidence": 0.12, "scores": {"positive": 0.12}}
    rows = (
        {"line": 12, "id": "a", **score},
        {"line": 13, "post_id": "12", **score},
        {"line": 14, "post_id": 12},
        {"line": 15, "id": "12"},
        {"line": 16, "author_id": "99", **score},
        {"line": 17, "post_id": "120"},
    )
    texts = ({"line": 12, "text": "no number"}, {"line": 18, "text": "see status/12?s=1"}, {"line": 19, "text": "1234"})
    folder.write_result(1, lines(*rows))
    folder.write_input(2, lines(*texts))
    assert erase_from_folder(folder.root, [12], [99]) == 5
    assert [orjson.loads(line)["line"] for line in b"".join(folder.results()).splitlines()] == [12, 17]
    assert [row["line"] for row in folder.read_input(2)] == [12, 19]


def test_ids_are_numbers_however_they_are_written() -> None:
    assert ids_of({"line": 1, "id": "x1", "post_id": "17", "author_id": 3, "text": "4"}) == {17, 3}
