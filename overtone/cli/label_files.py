"""Files of labels: the posts to label are written, and what people filled in is read and checked row by row.

What is wrong is named by line and field. Texts and labels are never repeated.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from overtone.db.feedback import Feedback, ToLabel
from overtone.errors import ConfigurationError, InvalidInputError
from serve.feedback import parse_feedback

_COLUMNS = ("post_id", "label", "annotator", "predicted_label", "confidence", "model_version", "reason", "text")
_FORMULA = ("=", "+", "-", "@", "\t")
_MAX_FIELD_CHARS = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Wrong:
    """One thing that is wrong with a file."""

    line: int
    field: str
    problem: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A row that is right."""

    line: int
    item: Feedback


@dataclass(frozen=True, slots=True)
class LabelFile:
    """What a file holds."""

    rows: int
    unlabelled: int
    """Rows whose label is empty: those that nobody came to yet."""
    labelled: tuple[Labelled, ...]
    wrong: tuple[Wrong, ...]


@contextmanager
def create_file(path: Path) -> Iterator[TextIO]:
    """A new file, readable by this user alone; it is removed again when the block fails.

    Raises:
        ConfigurationError: its name has another ending, it exists, or it cannot be made.
    """
    if path.suffix.lower() not in {".csv", ".jsonl", ".ndjson"}:
        raise ConfigurationError(f"{path}: the name must end in .csv, .jsonl or .ndjson.")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(f"{path} exists, and may hold labels. Choose another --output.") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_posts(file: TextIO, posts: Sequence[ToLabel], *, as_json: bool) -> None:
    """Write `posts`, a line each, as CSV or JSON lines: an erasure finds a line by the id in it."""
    records = [{"label": "", "annotator": "", **_known(post)} for post in posts]
    if as_json:
        for record in records:
            file.write(json.dumps({name: record[name] for name in _COLUMNS}, ensure_ascii=False) + "\n")
        return
    table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
    table.writeheader()
    for record in records:
        text = " ".join(str(record["text"]).split())
        # Spreadsheets run what looks like a formula.
        table.writerow(record | {"text": f"'{text}" if text.startswith(_FORMULA) else text})


def read_labels(path: Path, labels: Sequence[str], annotator: str = "") -> LabelFile:
    """The rows of `path`, each checked by the rules of `POST /feedback`.

    Raises:
        ConfigurationError: it cannot be opened or is of no known format.
        InvalidInputError: it has no column label, or neither post_id nor text.
    """
    rows = unlabelled = 0
    kept: dict[tuple[str, bytes], Labelled] = {}
    wrong: list[Wrong] = []
    repeated: list[Labelled] = []
    for line, row in _rows(path):
        rows += 1
        if isinstance(row, Wrong):
            wrong.append(row)
            continue
        body = _body(row, annotator)
        if not body.get("label"):
            unlabelled += 1
            continue
        try:
            one = Labelled(line, parse_feedback(body, labels))
        except InvalidInputError as error:
            wrong += [Wrong(line, problem.field, problem.problem) for problem in error.details["errors"]]
            continue
        before = kept.setdefault((one.item.annotator, one.item.subject), one)
        if before.item.label != one.item.label:
            wrong.append(Wrong(line, "label", f"line {before.line} says another for the same"))
            repeated.append(before)
    doubtful = {one.line for one in repeated}
    right = tuple(one for one in kept.values() if one.line not in doubtful)
    wrong += [Wrong(line, "label", "a later line says another for the same") for line in doubtful]
    return LabelFile(rows, unlabelled, right, tuple(sorted(wrong, key=lambda one: one.line)))


def _known(post: ToLabel) -> dict[str, Any]:
    known = {name: getattr(post, name) for name in ("predicted_label", "model_version", "reason", "text")}
    # A spreadsheet rounds numbers of more than 15 digits; as text in JSON, no reader does.
    confidence = None if post.confidence is None else round(post.confidence, 4)
    return {"post_id": str(post.post_id), "confidence": confidence, **known}


def _body(row: Mapping[str, Any], annotator: str) -> dict[str, Any]:
    body = {name: row[name] for name in ("label", "post_id", "text", "annotator") if row.get(name) not in (None, "")}
    if isinstance(body.get("label"), str):
        body["label"] = body["label"].strip()
    post_id = body.get("post_id")
    if post_id is not None:
        body.pop("text", None)
        body["post_id"] = str(post_id).strip() if isinstance(post_id, int | str) else post_id
    if annotator:
        body.setdefault("annotator", annotator)
    return body


_Found = tuple[int, Mapping[str, Any] | Wrong]


def _rows(path: Path) -> Iterator[_Found]:
    readers = {".csv": _separated, ".tsv": _separated, ".jsonl": _json_lines, ".ndjson": _json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigurationError(f"{path}: the name must end in {', '.join(readers)}.")
    try:
        # Bytes that are no UTF-8 become half surrogates, which the rules then name row by row.
        file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        yield from reader(file, "\t" if path.suffix.lower() == ".tsv" else ",")


def _separated(file: io.TextIOWrapper, delimiter: str) -> Iterator[_Found]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    table = csv.reader(file, delimiter=delimiter)
    try:
        header = next(table, [])
        if "label" not in header or not {"post_id", "text"}.intersection(header):
            raise InvalidInputError("line 1: the header must name label, and post_id or text.")
        end = table.line_num
        for row in table:
            line, end = end + 1, table.line_num
            if not row:
                continue
            if len(row) == len(header):
                yield line, dict(zip(header, row, strict=True))
            else:
                yield line, Wrong(line, "row", f"has {len(row)} columns where the header has {len(header)}")
    except csv.Error as error:
        raise InvalidInputError(f"line {table.line_num}: {error}.") from None


def _json_lines(file: io.TextIOWrapper, _delimiter: str) -> Iterator[_Found]:
    for line, written in enumerate(file, start=1):
        if not written.strip():
            continue
        try:
            value = json.loads(written)
        except (ValueError, RecursionError):
            yield line, Wrong(line, "row", "is not JSON")
            continue
        yield line, value if isinstance(value, dict) else Wrong(line, "row", "is not an object")
