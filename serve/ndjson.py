"""Batches of any length: a text a line in, a prediction a line out, while the body is still on its way.

A few chunks of lines are under way at a time. When they are all taken, the body is no longer read, so that memory is
bounded whatever the caller sends and however slowly it reads; while one is free, what has arrived is classified at
once.
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from overtone.errors import InvalidInputError, OverloadedError, TooLargeError, TooSlowError
from serve.bodies import FieldError, checked_text, invalid, parse_json
from serve.encodings import PIECE_BYTES, Deflater, Inflater, accepts_gzip, is_gzip
from serve.options import PLAIN, split
from serve.problems import problem, problem_response

MAX_LINE_BYTES = 320 * 1024
"""The longest line: the longest text, with every character escaped."""
CHUNK_LINES = 256
CHUNK_CHARS = 512 * 1024
CHUNKS_UNDER_WAY = 4
STALLED_S = 60.0
"""A caller that reads nothing of its answer for so long has gone, or waits for us while we wait for it."""
SILENT_S = 60.0
"""A caller that sends nothing for so long, and has no answer to wait for, has gone."""

_NDJSON = re.compile(rb"application/(?:x-ndjson|ndjson|jsonl|x-jsonlines)\s*(?:;|$)", re.IGNORECASE)

Line = str | Exception
"""The text of a line, or what is wrong with it."""


def is_ndjson(request: Request) -> bool:
    """Whether the body is said to be lines of JSON."""
    return any(name == b"content-type" and _NDJSON.match(value) for name, value in request.scope["headers"])


class LineSplitter:
    """The lines of a body that comes in parts."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._held = bytearray()
        self._is_skipping = False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that `data` ends, without their ends; None for one over the limit, which is never held whole."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            yield self._whole(part)
        self._held += rest
        if len(self._held) > self._limit:
            self._held, self._is_skipping = bytearray(), True

    def finish(self) -> bytes | None:
        """What follows the last end of a line."""
        return self._whole(b"")

    def _whole(self, part: bytes) -> bytes | None:
        is_over = self._is_skipping or len(self._held) + len(part) > self._limit
        line = None if is_over else bytes(self._held) + part
        self._held, self._is_skipping = bytearray(), False
        return line


def parse_line(line: bytes | None) -> Line:
    """The text in a line, which is a JSON string or `{"text": ...}`; None stands for a line over the limit."""
    if line is None:
        wrong = FieldError("line", f"is over the limit of {MAX_LINE_BYTES} bytes", MAX_LINE_BYTES)
        return TooLargeError(f"The line is over the limit of {MAX_LINE_BYTES} bytes.", errors=[wrong])
    try:
        value = parse_json(line, "The line")
        if not isinstance(value, str):
            value, asked = split(value, "text")
            if asked is not PLAIN:
                raise invalid([FieldError("line", "holds options; they belong into the query of the address")])
        return checked_text(value)
    except Exception as error:  # whatever is wrong with it, the other lines are not to blame
        return error


@dataclass(slots=True)
class Chunk:
    """Lines that are classified together."""

    numbers: list[int] = field(default_factory=list)
    """Of each line in the body, from 1."""
    lines: list[Line] = field(default_factory=list)
    chars: int = 0

    @property
    def is_full(self) -> bool:
        """Whether no further line should join."""
        return len(self.lines) >= CHUNK_LINES or self.chars >= CHUNK_CHARS

    @property
    def texts(self) -> list[str]:
        """The texts of the lines that have one."""
        return [line for line in self.lines if isinstance(line, str)]

    def add(self, number: int, line: Line) -> None:
        """Let `line` join."""
        self.numbers.append(number)
        self.lines.append(line)
        self.chars += len(line) if isinstance(line, str) else 256


@dataclass(frozen=True, slots=True)
class Stream:
    """What a streamed answer needs of the service."""

    spend: Callable[[int], Awaitable[None]]
    """Counts so many texts against the limits of the caller."""
    classify: Callable[[list[str]], Awaitable[list[Any]]]
    """What to show for each text, or why there is nothing; raises when the whole chunk failed."""
    patience_s: float
    """How long a chunk waits for room, and for a limit of the caller to allow it."""


class StreamedAnswers(Response):
    """The answer to a streamed batch: errors before its first line have their status, later ones are its last line."""

    def __init__(self, request: Request, stream: Stream) -> None:
        """Read from `request`.

        Raises:
            UnsupportedMediaTypeError: the body is packed, and not with gzip.
        """
        super().__init__(media_type="application/x-ndjson")
        self._request = request
        self._stream = stream
        encoding = request.headers.get("content-encoding", "").encode("latin-1")
        self._inflater = Inflater() if is_gzip(encoding) else None
        self._deflater = Deflater() if accepts_gzip(request.scope["headers"]) else None
        self._next = Chunk()
        self._under_way: deque[asyncio.Task[bytes]] = deque()
        self._failure: Exception | None = None
        self._has_ended = False
        self._changed = asyncio.Event()
        self._has_begun = False
        self._sent_at = -SILENT_S
        """On the clock of the event loop."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = asyncio.create_task(self._read())
        answers = asyncio.create_task(self._answer(send))
        try:
            done, _ = await asyncio.wait((reader, answers), return_when=asyncio.FIRST_COMPLETED)
            await (answers if answers in done else reader)
        except ClientDisconnect:
            return
        except Exception as error:  # the edge: whatever happened becomes the answer, or its last line
            await self._fail(error, scope, receive, send)
        finally:
            tasks = (reader, answers, *self._under_way)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        """Fill chunks with the lines of the body, then wait for the client to leave.

        Raises:
            ClientDisconnect: it left.
        """
        number = 0
        try:
            async for line in self._lines():
                number += 1
                if line is None or line.strip():
                    await self._take(number, parse_line(line))
        except InvalidInputError as error:
            self._failure = error
        self._has_ended = True
        self._start_chunk()
        self._changed.set()
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    async def _lines(self) -> AsyncIterator[bytes | None]:
        splitter = LineSplitter()
        async for data in self._pieces():
            for line in splitter.feed(data):
                yield line
            self._start_chunk()
        yield splitter.finish()

    async def _pieces(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._message()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            if self._inflater is not None:
                for piece in self._inflater.feed(body):
                    yield piece
                    await asyncio.sleep(0)
            else:
                for start in range(0, len(body), PIECE_BYTES):
                    yield body[start : start + PIECE_BYTES]
        if self._inflater is not None:
            self._inflater.finish()

    async def _message(self) -> Message:
        """What comes next.

        Raises:
            TooSlowError: nothing came for long, and the caller was not waiting for us either.
        """
        while True:
            try:
                async with asyncio.timeout(SILENT_S):
                    return await self._request.receive()
            except TimeoutError:
                is_answered = asyncio.get_running_loop().time() - self._sent_at >= SILENT_S
                if is_answered and not self._under_way:
                    raise TooSlowError(f"Nothing of the body arrived for {SILENT_S:.0f} s.") from None

    async def _take(self, number: int, line: Line) -> None:
        self._next.add(number, line)
        while self._next.is_full:
            self._start_chunk()
            if self._next.is_full:
                self._changed.clear()
                await self._changed.wait()

    def _start_chunk(self) -> None:
        """Classify the lines that have come, if there is room for a further chunk."""
        if self._next.lines and len(self._under_way) < CHUNKS_UNDER_WAY:
            self._under_way.append(asyncio.create_task(self._answered(self._next)))
            self._next = Chunk()
            self._changed.set()

    async def _answered(self, chunk: Chunk) -> bytes:
        """The lines of the answer for `chunk`."""
        rows = iter(await self._classified(chunk.texts))
        shown: list[bytes] = []
        for number, line in zip(chunk.numbers, chunk.lines, strict=True):
            result = next(rows) if isinstance(line, str) else line
            if isinstance(result, Exception):
                result = {"error": problem(self._request, result), "line": number}
            shown.append(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))
        return b"".join(shown)

    async def _classified(self, texts: list[str]) -> list[Any]:
        """What to show for each text; while there is no room, wait instead of failing."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._stream.patience_s
        is_paid = False
        while texts:
            try:
                if not is_paid:
                    await self._stream.spend(len(texts))
                    is_paid = True
                return await self._stream.classify(texts)
            except OverloadedError as error:
                if clock() + error.retry_after_s > until:
                    raise
                await asyncio.sleep(error.retry_after_s)
        return []

    async def _answer(self, send: Send) -> None:
        while self._under_way or not self._has_ended or self._next.lines:
            if not self._under_way:
                self._changed.clear()
                await self._changed.wait()
                continue
            lines = await self._under_way[0]
            self._under_way.popleft()
            self._start_chunk()
            self._changed.set()
            await self._send(lines, send)
        if self._failure is not None:
            raise self._failure
        await self._send(b"", send, is_last=True)

    async def _send(self, lines: bytes, send: Send, *, is_last: bool = False) -> None:
        body = lines
        if self._deflater is not None:
            body = (self._deflater.feed(lines) if lines else b"") + (self._deflater.finish() if is_last else b"")
        try:
            async with asyncio.timeout(STALLED_S):
                if not self._has_begun:
                    self._has_begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self._head()})
                await send({"type": "http.response.body", "body": body, "more_body": not is_last})
            self._sent_at = asyncio.get_running_loop().time()
        except TimeoutError:
            raise ClientDisconnect from None

    def _head(self) -> list[tuple[bytes, bytes]]:
        del self.headers["content-length"]
        if self._deflater is not None:
            self.headers["content-encoding"] = "gzip"
            self.headers["vary"] = "Accept-Encoding"
        return self.raw_headers

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_begun:
            await problem_response(self._request, error)(scope, receive, send)
            return
        last = {"error": problem(self._request, error), "ended": True}
        await self._send(orjson.dumps(last, option=orjson.OPT_APPEND_NEWLINE), send, is_last=True)
