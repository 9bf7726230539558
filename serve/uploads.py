"""An upload to be scored, taken apart while it arrives: checked line by line and put into files of chunks.

Memory holds one chunk at a time, however long the upload. What is wrong is named by line and field, never by its text.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, Literal

import orjson

from overtone.db.jobs import MAX_PROBLEMS
from overtone.errors import InvalidInputError, MalformedError, TooLargeError
from overtone.job_files import ID_FIELDS, JobFolder
from serve.bodies import FieldError, invalid, text_problem
from serve.ndjson import MAX_LINE_BYTES, LineSplitter

CHUNK_LINES = 2_000
CHUNK_CHARS = 1_000_000
MAX_ID_CHARS = 200
_MAX_ID = 2**63 - 1
_MAX_FIELD_CHARS = 128 * 1024

Format = Literal["ndjson", "csv", "tsv"]
_Line = tuple[int, Any, Mapping[str, Any]]
"""Its number, its text or the `FieldError` that stands for it, and the fields beside it."""


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """How an upload is read."""

    format: Format
    column: str = "text"
    """Field or column that holds the text."""
    rejects: bool = False
    """Whether one line that is wrong refuses the upload; else it gets an error in the result."""
    max_bytes: int = 4 * 2**30
    max_texts: int = 10_000_000


@dataclass(slots=True)
class Upload:
    """What was taken in."""

    chunks: list[int] = field(default_factory=list)
    """Lines of each chunk."""
    wrong: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    """Of the first lines that are wrong: line, field, problem, limit and size."""

    @property
    def lines(self) -> int:
        """How many lines the chunks hold."""
        return sum(self.chunks)


def take_in(pieces: Iterator[bytes], folder: JobFolder, options: UploadOptions) -> Upload:
    """Put the upload that arrives in `pieces` into the input of `folder`. Blocking.

    Raises:
        InvalidInputError: it holds no line, a line is wrong that may not be, or a column is missing.
        TooLargeError: it is over a limit.
        MalformedError: it is no CSV.
        OSError: the files cannot be written.
    """
    upload = Upload()
    writer = _Chunks(folder, upload)
    for number, text, fields in _READERS[options.format](_bounded(pieces, options.max_bytes), options):
        row: dict[str, Any] = {"line": number}
        problem = text if isinstance(text, FieldError) else text_problem(text, options.column)
        ids, id_problem = _ids(fields)
        problem = problem or id_problem
        row |= ids
        if problem is None:
            row["text"] = text
        else:
            upload.wrong += 1
            shown = {"line": number, **{name: value for name, value in asdict(problem).items() if value is not None}}
            if len(upload.problems) < MAX_PROBLEMS:
                upload.problems.append(shown)
            row["error"] = {"code": "invalid_input", "detail": f"{problem.field} {problem.problem}."}
        writer.add(row, len(text) if isinstance(text, str) else 0)
        if writer.lines > options.max_texts:
            raise _over("lines", options.max_texts, writer.lines)
    writer.flush()
    if not upload.lines:
        raise invalid([FieldError("body", "must hold at least 1 line", 1, 0)])
    if upload.wrong and (options.rejects or upload.wrong == upload.lines):
        raise _refused(upload)
    return upload


class _Chunks:
    """Rows on their way into files."""

    def __init__(self, folder: JobFolder, upload: Upload) -> None:
        self._folder = folder
        self._upload = upload
        self._rows: list[bytes] = []
        self._chars = 0
        self.lines = 0

    def add(self, row: dict[str, Any], chars: int) -> None:
        self._rows.append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self._chars += chars
        self.lines += 1
        if len(self._rows) >= CHUNK_LINES or self._chars >= CHUNK_CHARS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._upload.chunks.append(len(self._rows))
            self._folder.write_input(len(self._upload.chunks), b"".join(self._rows))
            self._rows, self._chars = [], 0


def _bounded(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise _over("bytes", limit, size)
        yield piece


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes | None]:
    splitter = LineSplitter()
    for piece in pieces:
        yield from splitter.feed(piece)
    last = splitter.finish()
    if last is None or last:
        yield last


def _json_rows(pieces: Iterator[bytes], options: UploadOptions) -> Iterator[_Line]:
    for number, line in enumerate(_lines(pieces), 1):
        if line is None:
            yield number, FieldError("line", f"is over the limit of {MAX_LINE_BYTES} bytes", MAX_LINE_BYTES), {}
        elif line.strip():
            yield number, *_json_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, options.column)


def _json_row(line: bytes, column: str) -> tuple[Any, Mapping[str, Any]]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return FieldError("line", "is not valid JSON in UTF-8"), {}
    if not isinstance(value, dict):
        return value, {}
    return (value[column] if column in value else FieldError(column, "is required")), value


def _separated_rows(pieces: Iterator[bytes], options: UploadOptions) -> Iterator[_Line]:
    delimiter = "\t" if options.format == "tsv" else ","
    # Of the process. A quote that nobody closes would take the rest of the file for one field.
    csv.field_size_limit(_MAX_FIELD_CHARS)
    reader = csv.reader(_decoded(_lines(pieces)), delimiter=delimiter)
    try:
        names = next(reader, [])
        where = _column(names, options.column)
        kept = {name: names.index(name) for name in ID_FIELDS if name in names}
        begins = reader.line_num + 1
        for cells in reader:
            number, begins = begins, reader.line_num + 1
            if not cells:
                continue
            text = cells[where] if where < len(cells) else FieldError(options.column, "is missing: the row is short")
            yield number, text, {name: cells[at] for name, at in kept.items() if at < len(cells) and cells[at]}
    except csv.Error:
        problem = f"is not valid {options.format.upper()}, or a field of it is too long"
        wrong = FieldError(f"line {reader.line_num}", problem)
        raise MalformedError(f"Line {reader.line_num} {problem}.", errors=[wrong]) from None


def _decoded(lines: Iterator[bytes | None]) -> Iterator[str]:
    first = next(lines, b"")
    for number, line in enumerate(chain([first and first.removeprefix(b"\xef\xbb\xbf")], lines), 1):
        if line is None:
            wrong = FieldError(f"line {number}", f"is over the limit of {MAX_LINE_BYTES} bytes", MAX_LINE_BYTES)
            raise TooLargeError(f"Line {number} is over the limit of {MAX_LINE_BYTES} bytes.", errors=[wrong])
        # Bytes that are no UTF-8 become half surrogates, which the rules for texts then name by line.
        yield line.decode("utf-8", "surrogateescape") + "\n"


def _column(names: list[str], column: str) -> int:
    if names.count(column) == 1:
        return names.index(column)
    # Without a header the first line is somebody's text: it is not shown.
    problem = f"must be the name of one column in the first line, which names {len(names)} columns"
    raise invalid([FieldError(column, problem, 1, names.count(column))])


def _ids(fields: Mapping[str, Any]) -> tuple[dict[str, str | int], FieldError | None]:
    """What tells a line apart from others, as it was given, and what is wrong with it."""
    found: dict[str, str | int] = {}
    for name in ID_FIELDS:
        value = fields.get(name)
        if value is None:
            continue
        if name == "id":
            is_good = _is_name(value) or (_is_integer(value) and abs(value) <= _MAX_ID)
            wanted = f"must be a string of 1 to {MAX_ID_CHARS} characters, or an integer"
        else:
            digits = str(value) if _is_integer(value) else value
            is_good = (
                isinstance(digits, str) and digits.isascii() and digits.isdigit() and 0 < int(digits[:20]) <= _MAX_ID
            )
            wanted = f"must be a number from 1 to {_MAX_ID}"
        if not is_good:
            return found, FieldError(name, wanted)
        found[name] = value
    return found, None


def _is_name(value: Any) -> bool:
    return text_problem(value) is None and len(value) <= MAX_ID_CHARS


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(upload: Upload) -> InvalidInputError:
    problems = [
        FieldError(f"line {item['line']}, {item['field']}", item["problem"], item.get("limit"), item.get("size"))
        for item in upload.problems
    ]
    first = problems[0]
    return InvalidInputError(
        f"{upload.wrong} of {upload.lines} lines are wrong; {first.field}: {first.problem}.", errors=problems
    )


def _over(unit: str, limit: int, size: int) -> TooLargeError:
    problem = FieldError("body", f"is over the limit of {limit} {unit}", limit, size)
    return TooLargeError(f"The body is over the limit of {limit} {unit}.", errors=[problem])


_READERS: dict[Format, Callable[[Iterator[bytes], UploadOptions], Iterator[_Line]]] = {
    "ndjson": _json_rows,
    "csv": _separated_rows,
    "tsv": _separated_rows,
}
