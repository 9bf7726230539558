"""Files of texts: reading them row by row, and finding where an output file that was begun ends."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from overtone.errors import ConfigurationError, InvalidInputError

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
STANDARD_INPUT = "-"

_MAX_FIELD_CHARS = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row from which no text could be taken."""

    problem: str


Row = Any
"""The text of a row, whatever its type, or `Unreadable`."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What an output file holds already."""

    rows: int = 0
    last_text: str | None = None
    """Text of the last row, if that row has one."""


class RowFile:
    """The rows of one input."""

    def __init__(self, raw: BinaryIO, kind: str, column: str, *, size: int | None) -> None:
        self.size = size
        """Bytes in all; None where that cannot be known."""
        self._raw = raw
        # Bytes that are no UTF-8 become half surrogates, which the limits on texts then name row by row.
        self._lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._kind = kind
        self._column = column

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._raw.tell() if self.size is not None else 0

    def close(self) -> None:
        """Close the input."""
        self._lines.close()

    def rows(self) -> Iterator[Row]:
        """Every row, in order.

        Raises:
            InvalidInputError: the file has no such column.
        """
        lines = self._lines
        if self._kind in {".csv", ".tsv"}:
            return _separated(lines, self._column, "\t" if self._kind == ".tsv" else ",")
        if self._kind in {".jsonl", ".ndjson"}:
            return _json_lines(lines, self._column)
        if self._kind == ".txt":
            return (line.rstrip("\r\n") for line in lines)
        return _guessed(lines, self._column)


@contextmanager
def open_rows(source: str, column: str) -> Iterator[RowFile]:
    """The rows of the file `source`, or of standard input for `-`: JSON lines or one text a line, as it looks.

    Raises:
        ConfigurationError: it cannot be opened or is of no known format.
    """
    if source == STANDARD_INPUT:
        yield RowFile(sys.stdin.buffer, STANDARD_INPUT, column, size=None)
        return
    path = Path(source)
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"{path}: the name must end in one of {', '.join(FORMATS)}.")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    file = RowFile(raw, path.suffix.lower(), column, size=path.stat().st_size)
    with closing(file):
        yield file


def find_end(path: Path) -> Begun:
    """How far the output at `path` has come; a last line that was cut off is removed from it.

    Raises:
        ConfigurationError: it is no output of this command.
    """
    try:
        with path.open("r+b") as file:
            rows, last, end = 0, b"", 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                rows, last, end = rows + 1, line, end + len(line)
            file.truncate(end)
    except FileNotFoundError:
        return Begun()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be continued: {error.strerror}.") from error
    if not rows:
        return Begun()
    try:
        record = json.loads(last)
        if record["row"] != rows - 1:
            raise ValueError
        text = record.get("text")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigurationError(f"{path} exists and is no output of this command. Choose another --output.") from None
    return Begun(rows, text if isinstance(text, str) else None)


def skip_done(rows: Iterator[Row], begun: Begun, output: Path) -> None:
    """Move `rows` on to the first one that `output` lacks.

    Raises:
        ConfigurationError: `output` was made from other rows.
    """
    row: Row = None
    for number in range(begun.rows):
        row = next(rows, _END)
        if row is _END:
            raise ConfigurationError(
                f"{output} holds {begun.rows} rows, the input only {number}: it was made from another. "
                "Remove it or choose another --output."
            )
    if begun.last_text is not None and row != begun.last_text:
        raise ConfigurationError(
            f"Row {begun.rows - 1} of {output} is another text than that of the input: it was made from another. "
            "Remove it or choose another --output."
        )


_END = object()


def _separated(lines: io.TextIOWrapper, column: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    reader = csv.DictReader(lines, delimiter=delimiter)
    names = list(reader.fieldnames or [])
    if column not in names:
        shown = ", ".join(names[:20]) or "none"
        raise InvalidInputError(f"There is no column {column!r}; the columns are: {shown}. Name it with --text-column.")
    return (row[column] if row[column] is not None else Unreadable("the row is too short") for row in reader)


def _json_lines(lines: Iterator[str], column: str) -> Iterator[Row]:
    for line in lines:
        if line.strip():
            yield _json_text(line, column)


def _json_text(line: str, column: str) -> Row:
    try:
        value = json.loads(line)
    except ValueError:
        return Unreadable("the line is not JSON")
    if not isinstance(value, dict):
        return value
    return value[column] if column in value else Unreadable(f"the object has no field {column!r}")


def _guessed(lines: io.TextIOWrapper, column: str) -> Iterator[Row]:
    first = next(lines, None)
    if first is None:
        return iter(())
    every = _again(first, lines)
    if first.lstrip()[:1] in {"{", '"'}:
        return _json_lines(every, column)
    return (line.rstrip("\r\n") for line in every)


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
