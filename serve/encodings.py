"""Compressed bodies, both ways. What comes in is inflated piece by piece, so that a small body cannot become a large
one before anybody looks."""

import asyncio
import re
import zlib
from collections.abc import Iterator, Sequence

from starlette.responses import Response

from overtone.errors import MalformedError, TooLargeError, UnsupportedMediaTypeError

PIECE_BYTES = 64 * 1024
MAX_EXPANSION = 200
"""Times its size that a stream may grow to, beyond `FREE_BYTES`. Texts shrink to a third, rarely to a twentieth."""
FREE_BYTES = 64 * 1024 * 1024
MIN_GZIP_BYTES = 1024
"""A smaller answer would gain nothing by being compressed."""

_GZIP = 31
_FAST = 1
_THREAD_BYTES = 64 * 1024
_ACCEPTED = re.compile(
    rb"(?:^|,)\s*(?:x-)?(?:gzip|\*)\s*(?:;\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*)?(?=,|$)", re.IGNORECASE
)

Headers = Sequence[tuple[bytes, bytes]]


def is_gzip(encoding: bytes) -> bool:
    """Whether a body with the header `Content-Encoding: encoding` is gzip.

    Raises:
        UnsupportedMediaTypeError: it is neither gzip nor plain.
    """
    name = encoding.strip().lower()
    if name not in {b"", b"identity", b"gzip", b"x-gzip"}:
        raise UnsupportedMediaTypeError("The header Content-Encoding must be gzip, or be left out.")
    return name.endswith(b"gzip")


class Inflater:
    """The contents of a gzip body that comes in parts."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(_GZIP)
        self._read = 0
        self._given = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` adds, at most `PIECE_BYTES` at a time.

        Raises:
            MalformedError: not gzip, or damaged.
            TooLargeError: the contents are out of proportion to the body.
        """
        self._read += len(data)
        while data:
            if self._stream.eof:
                self._stream = zlib.decompressobj(_GZIP)
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise _damaged() from None
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            self._given += len(piece)
            if self._given > max(FREE_BYTES, self._read * MAX_EXPANSION):
                raise TooLargeError(f"The gzip body holds more than {MAX_EXPANSION} times its size.")
            if piece:
                yield piece

    def finish(self) -> None:
        """Say that the body has ended.

        Raises:
            MalformedError: the gzip data has not.
        """
        if not self._stream.eof:
            raise _damaged()


async def inflate(body: bytes, max_bytes: int) -> bytes:
    """The contents of the gzip data `body`; the event loop runs on meanwhile.

    Raises:
        MalformedError: not gzip, damaged or cut off.
        TooLargeError: the contents are over `max_bytes`.
    """
    inflater = Inflater()
    pieces: list[bytes] = []
    size = 0
    for piece in inflater.feed(body):
        size += len(piece)
        if size > max_bytes:
            raise TooLargeError(f"The body is over the limit of {max_bytes} bytes when it is unpacked.")
        pieces.append(piece)
        if len(piece) == PIECE_BYTES:
            await asyncio.sleep(0)
    inflater.finish()
    return b"".join(pieces)


def accepts_gzip(headers: Headers) -> bool:
    """Whether the caller that sent `headers` can read gzip."""
    for name, value in headers:
        if name == b"accept-encoding":
            found = _ACCEPTED.search(value)
            return found is not None and float(found[1] or 1) > 0
    return False


async def compressed(response: Response, headers: Headers) -> Response:
    """`response`, as gzip where that pays and the caller that sent `headers` can read it."""
    body = bytes(response.body)
    if len(body) < MIN_GZIP_BYTES or not accepts_gzip(headers):
        return response
    # zlib works without the interpreter's lock, so that a large answer holds nobody up.
    if len(body) > _THREAD_BYTES:
        response.body = await asyncio.to_thread(zlib.compress, body, _FAST, _GZIP)
    else:
        response.body = zlib.compress(body, _FAST, _GZIP)
    response.headers["content-length"] = str(len(response.body))
    response.headers["content-encoding"] = "gzip"
    response.headers["vary"] = "Accept-Encoding"
    return response


class Deflater:
    """A gzip answer that is sent in parts, each of which can be read when it arrives."""

    def __init__(self) -> None:
        self._stream = zlib.compressobj(_FAST, zlib.DEFLATED, _GZIP)

    def feed(self, data: bytes) -> bytes:
        """The next part."""
        return self._stream.compress(data) + self._stream.flush(zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        """The end."""
        return self._stream.flush()


def _damaged() -> MalformedError:
    return MalformedError("The body is not whole, valid gzip.")
