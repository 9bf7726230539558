"""The files of jobs: what is to be scored, chunk by chunk, and the result of each chunk.

A job has a folder with `input` and `result`, and in each a file a chunk: JSON lines with the number of the line of the
upload, `text` (in inputs alone), and what the caller gave to tell the line by: `id`, `post_id`, `author_id`. Files are
written beside their place and renamed, so each is there whole or not at all, and the same chunk done twice leaves one
file. The suffix is their own, because `overtone.erasure_files` looks at the ids in them and not at every number.
Blocking.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson

SUFFIX = ".rows"
ID_FIELDS = ("id", "post_id", "author_id")

_PIECE_BYTES = 256 * 1024
_NUMBER = re.compile(rb"(?<!\d)\d{1,19}(?!\d)")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The folder of one job under `root`."""

    root: Path
    job_id: UUID

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / str(self.job_id)

    def make(self) -> None:
        """Make the folder, readable by its owner alone.

        Raises:
            FileExistsError: it is there.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.mkdir(mode=0o700)
        (self.path / "input").mkdir()
        (self.path / "result").mkdir()

    def write_input(self, number: int, lines: bytes) -> None:
        """Keep `lines` as chunk `number`."""
        _write(self._file("input", number), lines)

    def read_input(self, number: int) -> list[Row]:
        """The rows of chunk `number`.

        Raises:
            FileNotFoundError: it is not there any more: it is done, or the job is gone.
        """
        return [orjson.loads(line) for line in self._file("input", number).read_bytes().splitlines()]

    def write_result(self, number: int, lines: bytes) -> None:
        """Keep `lines` as the result of chunk `number`, in place of an earlier one."""
        _write(self._file("result", number), lines)

    def drop_input(self, number: int) -> None:
        """Remove the texts of a chunk that is done."""
        self._file("input", number).unlink(missing_ok=True)

    def drop_inputs(self) -> None:
        """Remove all texts, and what a killed process left half written."""
        shutil.rmtree(self.path / "input", ignore_errors=True)
        for draft in (self.path / "result").glob(".*"):
            draft.unlink(missing_ok=True)

    def drop(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path, ignore_errors=True)

    def results(self) -> Iterator[bytes]:
        """The results that there are, in the order of the upload, in pieces."""
        for path in sorted((self.path / "result").glob(f"*{SUFFIX}")):
            # A job may be deleted while its result is read.
            with suppress(FileNotFoundError), path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece

    def _file(self, kind: str, number: int) -> Path:
        return self.path / kind / f"{number:08d}{SUFFIX}"


def job_folders(root: Path) -> Iterator[JobFolder]:
    """Every job's folder under `root`."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        with suppress(ValueError):
            yield JobFolder(root, UUID(path.name))


def ids_of(row: Row) -> set[int]:
    """The numbers by which `row` may be found: ids given as numbers or as digits."""
    given = (row.get(name) for name in ID_FIELDS)
    return {int(value) for value in given if isinstance(value, int) or (isinstance(value, str) and value.isdecimal())}


def names_one_of(line: bytes, numbers: frozenset[bytes]) -> bool:
    """Whether a line of a job's file names one of `numbers`, as an id or in its text."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return True
    named = " ".join(str(row.get(name, "")) for name in (*ID_FIELDS, "text"))
    return not numbers.isdisjoint(_NUMBER.findall(named.encode("utf-8", "surrogatepass")))


def _write(path: Path, lines: bytes) -> None:
    # A name of its own: at-least-once delivery may have two consumers write the same chunk.
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
