"""The load generator: streams of requests, closed loop or open loop, and when each was answered.

A *closed* stream keeps its connections busy, one request at a time on each. An *open* stream sends at the times of a
Poisson process whether or not earlier requests were answered, and a request's latency counts from the moment it was
due: a server that stalls is charged for everything that should have been sent meanwhile. Several streams run at once
in one thread on uvloop, which costs about 40 us a request.

Run as `python -m benchmarks.client PLAN OUTPUT`: PLAN is a JSON file with a `Plan`, OUTPUT the .npz file to write, with
one float64 array [requests, 4] a stream: due, sent and answered, in seconds from the start, and the HTTP status, 0
when none came.
"""

import asyncio
import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

Rows = NDArray[np.float64]

DRAIN_S = 40.0
"""How long the end of an open stream waits for answers; the server gives up interactive requests after 30 s."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of request, and how it is sent."""

    name: str
    path: str
    bodies: str
    """File with one body a line; they are sent in turn."""
    headers: str
    """File with the header lines."""
    connections: int
    """Closed: so many are kept busy. Open: at most so many are opened."""
    phases: tuple[tuple[float, float], ...]
    """Requests a second and seconds of each phase; the rate of a closed stream is 0."""
    seed: int = 1


def arrivals(phases: Sequence[tuple[float, float]], seed: int) -> Iterator[float]:
    """The times, in seconds, at which a Poisson process of these rates has requests due."""
    dice = random.Random(seed)
    start = 0.0
    for rate, seconds in phases:
        at = start
        while rate > 0 and (at := at + dice.expovariate(rate)) < start + seconds:
            yield at
        start += seconds


def content_length(head: bytes) -> int | None:
    """The length that the lower-case response head `head` states, in bytes; None when the body is chunked."""
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0


class _Connection(asyncio.Protocol):
    """One request at a time; tells its driver what came of it."""

    def __init__(self, driver: "_Driver") -> None:
        self._driver = driver
        self._buffer = bytearray()
        self._transport: Any = None
        self._under_way: tuple[float, float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._driver.is_free(self)

    def send(self, request: bytes, due: float, now: float) -> None:
        self._under_way = (due, now)
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(self._buffer[:head_end]).lower()
        length = content_length(head)
        is_whole = (
            self._buffer.endswith(b"\r\n0\r\n\r\n") if length is None else len(self._buffer) >= head_end + 4 + length
        )
        if not is_whole or self._under_way is None:
            return
        due, sent = self._under_way
        self._under_way = None
        self._buffer.clear()
        self._driver.record(due, sent, int(head[9:12]))
        if b"connection: close" in head:
            self._transport.close()
        else:
            self._driver.is_free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._under_way is not None:
            self._driver.record(*self._under_way, 0)
        self._driver.is_lost(self)


class _Driver:
    """What both kinds of stream share: requests, connections, and the rows that are written down."""

    def __init__(self, stream: Stream, host: str, port: int) -> None:
        self._requests = cycle(_requests(stream, host, port))
        self._address = (host, port)
        self._stream = stream
        self._started = 0.0
        self._seconds = sum(seconds for _, seconds in stream.phases)
        self._rows: list[tuple[float, float, float, int]] = []

    @property
    def rows(self) -> Rows:
        return np.array(self._rows, dtype=np.float64).reshape(-1, 4)

    def now(self) -> float:
        return time.perf_counter() - self._started

    def record(self, due: float, sent: float, status: int) -> None:
        self._rows.append((due, sent, self.now(), status))

    def is_free(self, connection: _Connection) -> None:
        raise NotImplementedError

    def is_lost(self, connection: _Connection) -> None:
        raise NotImplementedError

    async def run_from(self, started: float) -> None:
        """Run with `started`, of `time.perf_counter`, as the start of all times."""
        self._started = started
        await self.run()

    async def run(self) -> None:
        raise NotImplementedError

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: _Connection(self), *self._address)


class Closed(_Driver):
    """Keeps its connections busy until the time is over and each has been answered twice."""

    _left = 0
    _lost = 0

    async def run(self) -> None:
        """Send until the end."""
        self._left = self._stream.connections
        self._finished = asyncio.Event()
        for _ in range(self._left):
            await self.connect()
        await self._finished.wait()

    def is_free(self, connection: _Connection) -> None:
        now = self.now()
        if now < self._seconds or len(self._rows) < 2 * self._stream.connections:
            connection.send(next(self._requests), now, now)
        else:
            connection.close()

    def is_lost(self, connection: _Connection) -> None:
        """Connect again while there is something to send, as often as a server closes after an answer."""
        self._lost += 1
        if self.now() < self._seconds and self._lost <= 10 * (len(self._rows) + 1):
            self._reconnecting = asyncio.get_running_loop().create_task(self._again())
        else:
            self._end_one()

    async def _again(self) -> None:
        try:
            await self.connect()
        except OSError:
            self.record(self.now(), self.now(), 0)
            self._end_one()

    def _end_one(self) -> None:
        self._left -= 1
        if not self._left:
            self._finished.set()


class Open(_Driver):
    """Sends when requests are due, over as many connections as are under way at once."""

    _due = 0
    _all_due = False
    _opened = 0
    _over = False

    async def run(self) -> None:
        """Send what is due until the end, then wait for what is under way."""
        self._idle: list[_Connection] = []
        self._waiting: deque[float] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._answered = asyncio.Event()
        for due in arrivals(self._stream.phases, self._stream.seed):
            # At least once around the loop for each, so that answers are read even when sending is behind.
            await asyncio.sleep(max(0.0, due - self.now()))
            self._due += 1
            self._waiting.append(due)
            self._serve()
        self._all_due = True
        await asyncio.sleep(max(0.0, self._seconds - self.now()))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), 0 if len(self._rows) == self._due else DRAIN_S)
        self._over = True
        for connection in self._idle:
            connection.close()
        self._rows += [(due, due, self.now(), 0) for due in self._waiting]

    def record(self, due: float, sent: float, status: int) -> None:
        super().record(due, sent, status)
        if self._all_due and len(self._rows) == self._due:
            self._answered.set()

    def _serve(self) -> None:
        while self._waiting and self._idle:
            self._idle.pop().send(next(self._requests), self._waiting.popleft(), self.now())
        missing = min(len(self._waiting), self._stream.connections - self._opened) - len(self._opening)
        for _ in range(missing):
            self._opened += 1
            task = asyncio.get_running_loop().create_task(self._open_one())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open_one(self) -> None:
        try:
            await self.connect()
        except OSError:
            self._opened -= 1
            if self._waiting:
                self.record(self._waiting.popleft(), self.now(), 0)

    def is_free(self, connection: _Connection) -> None:
        if self._over:
            connection.close()
            return
        self._idle.append(connection)
        self._serve()

    def is_lost(self, connection: _Connection) -> None:
        self._opened -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if not self._over:
            self._serve()


async def run(host: str, port: int, streams: Sequence[Stream]) -> dict[str, Rows]:
    """Send all `streams` at once; the rows of each by name, in the order of the answers."""
    drivers = {stream.name: (Open if stream.phases[0][0] else Closed)(stream, host, port) for stream in streams}
    started = time.perf_counter()
    await asyncio.gather(*(driver.run_from(started) for driver in drivers.values()))
    return {name: driver.rows for name, driver in drivers.items()}


def _requests(stream: Stream, host: str, port: int) -> list[bytes]:
    headers = Path(stream.headers).read_text(encoding="utf-8").replace("\n", "\r\n")
    head = f"POST {stream.path} HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}"
    bodies = Path(stream.bodies).read_bytes().splitlines()
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


def _main(plan: str, output: str) -> None:
    content = json.loads(Path(plan).read_text(encoding="utf-8"))
    streams = [Stream(**{**entry, "phases": tuple(map(tuple, entry["phases"]))}) for entry in content["streams"]]
    rows = uvloop.run(run(content["host"], content["port"], streams))
    np.savez(output, **rows)  # type: ignore[arg-type]  # the stubs take the names of arrays for its own options


if __name__ == "__main__":
    _main(*sys.argv[1:])
