"""A load generator of our own: keeps connections open, one request at a time on each.

Where few large requests are sent it measures more finely than wrk: what was under way at the end counts for neither
side, because the rate is taken between the first and the last answer of the stretch.

Run as `python -m benchmarks.client HOST PORT PATH CONNECTIONS SECONDS BODIES HEADERS`; the last two are files, the
bodies one a line. Writes one JSON object to standard output.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

RAMP = 0.2
"""Share of the stretch that is run before it and not counted."""


@dataclass
class Tally:
    """What the connections of one run saw."""

    counted_from: float
    """Answers before this time are the ramp and are left out."""
    deadline: float
    needed: int
    """Answers without which the stretch goes on beyond `deadline`."""
    answered_at: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    @property
    def is_over(self) -> bool:
        """Whether no further request is to be sent."""
        return time.perf_counter() >= self.deadline and len(self.answered_at) >= self.needed

    def count(self, sent_at: float, is_good: bool) -> None:
        """One answer, which is whole now."""
        now = time.perf_counter()
        self.refused += not is_good
        if now >= self.counted_from:
            self.answered_at.append(now)
            self.latencies.append(now - sent_at)


class _Connection(asyncio.Protocol):
    """Sends the next request when the answer to the last one is whole."""

    def __init__(self, requests: Any, tally: Tally, finished: asyncio.Future[None]) -> None:
        self._requests = requests
        self._tally = tally
        self._finished = finished
        self._buffer = bytearray()
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(self._buffer[:head_end]).lower()
        if len(self._buffer) < head_end + 4 + content_length(head):
            return
        self._tally.count(self._sent_at, head[9:12] == b"200")
        self._buffer.clear()
        if self._tally.is_over:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._tally.is_over:
            self._tally.failed += 1
        if not self._finished.done():
            self._finished.set_result(None)

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))


def content_length(head: bytes) -> int:
    """The length that the lower-case response head `head` states, in bytes; 0 if none."""
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return 0


async def run(host: str, port: int, requests: list[bytes], connections: int, seconds: float) -> dict[str, float]:
    """Load `host` for `seconds` over `connections` connections; the figures of `requests.lua`."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    tally = Tally(started + seconds * RAMP, started + seconds * (1 + RAMP), needed=2 * connections)
    ends = [loop.create_future() for _ in range(connections)]
    shared = cycle(requests)
    for end in ends:
        await loop.create_connection(lambda end=end: _Connection(shared, tally, end), host, port)  # type: ignore[misc]
    await asyncio.gather(*ends)
    return figures(tally)


def figures(tally: Tally) -> dict[str, float]:
    """What came of a run: rate in requests a second, latencies in milliseconds."""
    latencies = sorted(tally.latencies) or [0.0]
    spread_s = tally.answered_at[-1] - tally.answered_at[0] if len(tally.answered_at) > 1 else 0.0
    return {
        "requests": len(tally.answered_at),
        "requests_per_s": (len(tally.answered_at) - 1) / spread_s if spread_s else 0.0,
        "refused": tally.refused,
        "failed": tally.failed,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1000,
    }


def _main(host: str, port: str, path: str, connections: str, seconds: str, bodies: str, headers: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\n" + Path(headers).read_text().replace("\n", "\r\n")
    requests = [
        f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in Path(bodies).read_bytes().splitlines()
    ]
    result = asyncio.run(run(host, int(port), requests, int(connections), float(seconds)))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
