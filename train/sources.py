"""Where labelled texts come from: files of four kinds, here or elsewhere, and data sets of the Hugging Face hub, read
with the place of every row, and what is wrong with rows.

What is wrong is told as a report: how many rows, on which lines, and why. The texts themselves are never in it.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
from pyarrow import ArrowException

from overtone.errors import DataError
from overtone.schema import MAX_TEXT_CHARS
from overtone.text import has_lone_surrogate, normalise
from train.hub import PREFIX, Found, hub_rows
from train.remote import is_remote, read_files

_SHOWN_LINES = 5
_SHOWN_LABEL = re.compile(r"[\w-]{1,20}")
_NOT_UTF8 = "not UTF-8"
_REQUIRED = ("label", "text")


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text and where it comes from."""

    source: str
    """Name of the file or table."""
    line: int
    """Of its file, counted from 1; the number of the row in a Parquet file or a table."""
    label: str
    text: str
    """As it was written."""
    post_id: int | None = None
    author_id: int | None = None
    annotator: str = ""
    """Who gave the label, where that is known."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one source, checked or not."""

    name: str
    rows: tuple[Row, ...]
    sha256: str
    """Of the file, or of the rows where there is none."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows of a source that share one flaw."""

    source: str
    reason: str
    lines: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lines[:_SHOWN_LINES]))
        more = f" and {len(self.lines) - _SHOWN_LINES} more" if len(self.lines) > _SHOWN_LINES else ""
        rows, lines = ("row", "line") if len(self.lines) == 1 else ("rows", "lines")
        return f"{self.source}: {len(self.lines)} {rows}: {self.reason} ({lines} {shown}{more})"


def read_rows(path: Path, names: Sequence[str]) -> Rows:
    """The rows of a file, all fit to be used: .tsv, .txt (tab-separated), .csv, .jsonl, .ndjson or .parquet; of all
    such files of a folder, or at an address such as s3://…; or of a data set of the hub, written hf:NAME:SPLIT or
    hf:NAME:CONFIG:SPLIT.

    Columns or fields `label` and `text`; `post_id`, `author_id` and `annotator` are read where they are there.

    Raises:
        DataError: the file cannot be read, has no such columns, holds no rows, or has rows with a label that is not
            in `names`, an empty or overlong text, bytes that are not UTF-8 or another number of columns than the
            header: with how many of each and on which lines.
    """
    if str(path).startswith(PREFIX):
        return _fit(str(path), [(str(path), hub_rows(str(path)))], names)
    if is_remote(path):
        return _fit(str(path), read_files(path, tuple(_READERS), _parse), names)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: name it {', '.join(_READERS)} after what it is")
    raw = _read_bytes(path)
    return _fit(str(path), [(str(path), reader(path, raw))], names, hashlib.sha256(raw).hexdigest())


def _fit(name: str, parts: Iterable[tuple[str, Iterable[Found]]], names: Sequence[str], sha256: str = "") -> Rows:
    """The rows of the files `parts`, each with its name, as those of the one source `name`."""
    flaws: dict[tuple[str, str], list[int]] = {}
    kept = []
    for file, line, found in ((file, *row) for file, rows in parts for row in rows):
        if isinstance(found, str):
            flaws.setdefault((file, found), []).append(line)
        elif problem := row_problem(found, names):
            flaws.setdefault((file, problem), []).append(line)
        else:
            kept.append(_row(file, line, found))
    if flaws:
        raise DataError(report([Finding(file, reason, tuple(lines)) for (file, reason), lines in flaws.items()]))
    if not kept:
        raise DataError(f"{name}: holds no rows")
    return Rows(name, tuple(kept), sha256 or _digest(kept))


def _digest(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.label}\t{row.annotator}\t{row.text}\n".encode())
    return digest.hexdigest()


def report(findings: Iterable[Finding]) -> str:
    """What was found, a flaw a line, the most frequent first."""
    return "\n".join(map(str, sorted(findings, key=lambda one: -len(one.lines))))


def require_classes(rows: Rows) -> None:
    """Raise DataError unless `rows` hold two labels or more."""
    if len({row.label for row in rows.rows}) < 2:
        count = len(rows.rows)
        raise DataError(f"{rows.name}: all {count} rows have the same label; a classifier needs at least two")


def _parse(path: Path, raw: bytes) -> Iterator[Found]:
    return _READERS[path.suffix.lower()](path, raw)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None


def _tsv(path: Path, raw: bytes) -> Iterator[Found]:
    lines = _decode(raw).replace("\r\n", "\n").removesuffix("\n").split("\n")
    table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return _table(path, table, "label<TAB>text")


def _csv(path: Path, raw: bytes) -> Iterator[Found]:
    return _table(path, csv.reader(io.StringIO(_decode(raw), newline="")), "label,text")


def _table(path: Path, table: Any, wanted: str) -> Iterator[Found]:
    try:
        header: list[str] = next(table, [])
        _require_columns(path, header, f"the header must be {wanted}")
        start = table.line_num
        for row in table:
            line, start = start + 1, table.line_num
            if len(row) == len(header):
                yield line, dict(zip(header, row, strict=True))
            elif row:
                yield line, f"{len(row)} columns where the header has {len(header)}"
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num}: {error}") from None


def _jsonl(path: Path, raw: bytes) -> Iterator[Found]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield number, _NOT_UTF8 if "utf-8" in str(error).lower() else "not JSON"
            continue
        if isinstance(value, dict) and all(isinstance(value.get(name), str) for name in _REQUIRED):
            yield number, value
        else:
            yield number, "not an object with the strings label and text"


def _parquet(path: Path, raw: bytes) -> Iterator[Found]:
    try:
        table = pq.read_table(io.BytesIO(raw))
    except ArrowException as error:
        raise DataError(f"{path}: is not a Parquet file ({type(error).__name__})") from None
    _require_columns(path, table.column_names, "the file needs both")
    known = [name for name in (*_REQUIRED, "post_id", "author_id", "annotator") if name in table.column_names]
    for number, value in enumerate(table.select(known).to_pylist(), start=1):
        is_whole = all(isinstance(value[name], str) for name in _REQUIRED)
        yield number, value if is_whole else "the label or the text is not a string"


_READERS: Mapping[str, Callable[[Path, bytes], Iterator[Found]]] = {
    ".tsv": _tsv,
    ".txt": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}


def _decode(raw: bytes) -> str:
    # Bytes that are not UTF-8 become lone surrogates, by which their rows are told from the others.
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _require_columns(path: Path, header: Sequence[str], hint: str) -> None:
    absent = [column for column in _REQUIRED if column not in header]
    if absent:
        raise DataError(f"{path}, line 1: no column {' and no column '.join(absent)}; {hint}")


def row_problem(found: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """What is wrong with a label and its text, or None."""
    label, text = found["label"], found["text"]
    if has_lone_surrogate(label + text):
        return _NOT_UTF8
    if label not in names:
        # Where the columns are swapped the label is a text, which is not to be repeated.
        shown = f"label {label!r}" if _SHOWN_LABEL.fullmatch(label) else "the label"
        return f"{shown} is not one of {', '.join(names)}"
    if len(text) > MAX_TEXT_CHARS:
        return f"the text is over {MAX_TEXT_CHARS} characters"
    if not normalise(text):
        return "the text is empty"
    return None


def _row(source: str, line: int, found: Mapping[str, Any]) -> Row:
    post_id, author_id = _number(found.get("post_id")), _number(found.get("author_id"))
    return Row(source, line, found["label"], found["text"], post_id, author_id, str(found.get("annotator") or ""))


def _number(value: Any) -> int | None:
    written = str(value or "")
    return int(written) if written.isascii() and written.isdigit() and len(written) <= 19 else None
