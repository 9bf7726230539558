"""A queue of records in a folder: bounded, in order, and as good as stored once `append` has returned.

Segments are files that only grow: a header and a payload for each record, with a checksum over both. A segment is
deleted when all of it was read and committed. What a crash tore off at the end of one is skipped, because nobody was
told that it was kept; damage anywhere else is reported, never read over in silence.
"""

import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from overtone.logging import get_logger

SUFFIX = ".spool"

_MAGIC = b"\xf5OS"
_HEADER = struct.Struct("<3sBII")
_LARGEST_PAYLOAD = 128 * 1024 * 1024
_SEGMENT_BYTES = 16 * 1024 * 1024
_MOST_OWNERS = 16
_READS_OF_A_BAD_RECORD = 3
_BETWEEN_READS_S = 0.01

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Record:
    """What was put in: a kind, 0 to 255, and bytes, which mean something to the owner alone."""

    kind: int
    payload: bytes


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Between two records."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next records, or else how many bytes there cannot be read; and where what comes after begins."""

    records: tuple[Record, ...]
    end: Position
    damaged_bytes: int = 0


class Spool:
    """The spool in one folder. One process owns it at a time; its threads may read and append at once. Blocking."""

    def __init__(self, folder: Path, max_bytes: int, *, segment_bytes: int = _SEGMENT_BYTES) -> None:
        """Take the folder over, with what an earlier owner left.

        Raises:
            BlockingIOError: another process owns it.
            OSError: the folder cannot be used.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_file)
            raise
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._mutex = threading.Lock()
        self._lengths = {int(path.stem): path.stat().st_size for path in sorted(folder.glob(f"*{SUFFIX}"))}
        saved = self._saved_position()
        self._last_segment = max([*self._lengths, saved.segment])
        self._position = max(saved, Position(min(self._lengths, default=saved.segment), 0))
        self._writing: IO[bytes] | None = None
        self._forget_read()

    @classmethod
    def claim(cls, root: Path, name: str, max_bytes: int) -> Self:
        """The first folder `root/name-N` that nobody owns, one that holds something before an empty one.

        Raises:
            OSError: none can be used.
        """
        free = cls.claim_all(root, name, max_bytes)
        if free:
            free.sort(key=lambda spool: spool.is_empty)
            for spool in free[1:]:
                spool.close()
            return free[0]
        for number in range(_MOST_OWNERS):
            if not (root / f"{name}-{number}").exists():
                return cls(root / f"{name}-{number}", max_bytes)
        raise OSError(f"{_MOST_OWNERS} processes own the spools under {root} already")

    @classmethod
    def claim_all(cls, root: Path, name: str, max_bytes: int) -> list[Self]:
        """Every folder `root/name-N` that is there and that nobody owns."""
        free: list[Self] = []
        for folder in sorted(root.glob(f"{name}-*")):
            try:
                free.append(cls(folder, max_bytes))
            except BlockingIOError:
                continue
        return free

    @property
    def size_bytes(self) -> int:
        """Bytes that are not yet read and committed."""
        with self._mutex:
            return self._size()

    @property
    def is_empty(self) -> bool:
        """Whether all was read and committed."""
        return not self.size_bytes

    def append(self, records: Sequence[Record]) -> int:
        """Put in as many of `records` as there is room for, and return how many; they survive a crash from then on.

        Raises:
            OSError: the disk refuses; none of them is kept.
        """
        with self._mutex:
            room, pieces = self._max_bytes - self._size(), list[bytes]()
            for record in records:
                piece = _packed(record)
                room -= len(piece)
                if room < 0:
                    break
                pieces.append(piece)
            if pieces:
                self._write(b"".join(pieces))
            return len(pieces)

    def read(self, limit: int) -> Chunk:
        """Up to `limit` of the oldest records that are not committed; the same again until they are.

        Raises:
            OSError: the disk refuses.
        """
        with self._mutex:
            start, lengths = self._position, dict(self._lengths)
        for number in sorted(number for number in lengths if number >= start.segment):
            offset = start.offset if number == start.segment else 0
            if offset < lengths[number]:
                chunk = self._read_segment(number, offset, lengths[number], limit)
                if chunk.records or chunk.damaged_bytes:
                    return chunk
                start = chunk.end
        return Chunk((), start)

    def commit(self, position: Position) -> None:
        """Forget all before `position`, which an earlier `read` gave."""
        with self._mutex:
            self._position = position
            self._forget_read()
            if self._lengths:
                draft = self._folder / "position.new"
                draft.write_text(f"{position.segment} {position.offset}\n", encoding="ascii")
                draft.replace(self._folder / "position")

    def close(self) -> None:
        """Let another process own the folder; what is in it stays."""
        with self._mutex:
            if self._writing is not None:
                self._writing.close()
                self._writing = None
        os.close(self._lock_file)

    def _size(self) -> int:
        return max(sum(self._lengths.values()) - (self._position.offset if self._lengths else 0), 0)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:020d}{SUFFIX}"

    def _saved_position(self) -> Position:
        try:
            segment, offset = (self._folder / "position").read_text(encoding="ascii").split()
            return Position(int(segment), int(offset))
        except (OSError, ValueError):
            return Position(0, 0)

    def _write(self, packed: bytes) -> None:
        file = self._writing or self._begin_segment()
        length = self._lengths[self._last_segment]
        try:
            file.write(packed)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(length)
            file.seek(length)
            raise
        self._lengths[self._last_segment] = length + len(packed)
        if length + len(packed) >= self._segment_bytes:
            file.close()
            self._writing = None

    def _begin_segment(self) -> IO[bytes]:
        self._last_segment += 1
        descriptor = os.open(self._path(self._last_segment), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        self._writing = os.fdopen(descriptor, "wb", buffering=0)
        self._lengths[self._last_segment] = 0
        if len(self._lengths) == 1:
            self._position = Position(self._last_segment, 0)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._writing

    def _read_segment(self, number: int, offset: int, length: int, limit: int) -> Chunk:
        records: list[Record] = []
        with self._path(number).open("rb") as file:
            file.seek(offset)
            while offset < length and len(records) < limit:
                record = _read_record(file, offset, length)
                if record is None:
                    break
                records.append(record)
                offset += _HEADER.size + len(record.payload)
            if records or offset >= length:
                return Chunk(tuple(records), Position(number, offset))
            found = _next_record(file, offset + 1, length)
        if found is None:
            _log.warning("spool.torn_end", size_bytes=length - offset)
            return Chunk((), Position(number, length))
        return Chunk((), Position(number, found), damaged_bytes=found - offset)

    def _forget_read(self) -> None:
        """Delete the segments before the position, and those that end there."""
        at = self._position
        for number in [one for one in self._lengths if one < at.segment or self._is_read(one)]:
            if number == self._last_segment and self._writing is not None:
                self._writing.close()
                self._writing = None
            self._path(number).unlink(missing_ok=True)
            del self._lengths[number]
            self._position = Position(min(self._lengths, default=self._last_segment + 1), 0)

    def _is_read(self, number: int) -> bool:
        return number == self._position.segment and self._position.offset >= self._lengths[number]


def blank_records(path: Path, is_doomed: Callable[[bytes], bool]) -> int:
    """Write spaces over the payloads of a segment for which `is_doomed`, where they stand; return how many.

    An owner may read and append meanwhile.

    Raises:
        OSError: the file can be neither read nor written.
    """
    blanked = 0
    with path.open("r+b", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        offset: int | None = 0
        while offset is not None and offset < length:
            file.seek(offset)
            record = _read_record(file, offset, length)
            if record is None:
                offset = _next_record(file, offset + 1, length)
                continue
            if is_doomed(record.payload):
                os.pwrite(file.fileno(), _packed(Record(record.kind, b" " * len(record.payload))), offset)
                blanked += 1
            offset += _HEADER.size + len(record.payload)
        os.fsync(file.fileno())
    return blanked


def _packed(record: Record) -> bytes:
    size, payload = len(record.payload), record.payload
    return _HEADER.pack(_MAGIC, record.kind, size, _checksum(record.kind, payload)) + payload


def _checksum(kind: int, payload: bytes) -> int:
    return zlib.crc32(payload, kind ^ len(payload))


def _read_record(file: IO[bytes], offset: int, length: int) -> Record | None:
    """The record at `offset`, where the file stands too; None if there is none that is whole."""
    for attempt in range(_READS_OF_A_BAD_RECORD):
        record, is_there = _try_record(file, offset, length)
        if record is not None or not is_there:
            return record
        # It may be in the middle of being blanked.
        time.sleep(_BETWEEN_READS_S * attempt)
        file.seek(offset)
    return None


def _try_record(file: IO[bytes], offset: int, length: int) -> tuple[Record | None, bool]:
    """The record if it is whole, and whether there is at least a header of one with room for its payload."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None, False
    magic, kind, size, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or size > min(_LARGEST_PAYLOAD, length - offset - _HEADER.size):
        return None, False
    payload = file.read(size)
    is_whole = len(payload) == size and _checksum(kind, payload) == checksum
    return (Record(kind, payload) if is_whole else None), True


def _next_record(file: IO[bytes], offset: int, length: int) -> int | None:
    """Where the next whole record begins at `offset` or after it."""
    file.seek(offset)
    rest = file.read(length - offset)
    found = rest.find(_MAGIC)
    while found >= 0:
        file.seek(offset + found)
        if _try_record(file, offset + found, length)[0] is not None:
            return offset + found
        found = rest.find(_MAGIC, found + 1)
    return None
