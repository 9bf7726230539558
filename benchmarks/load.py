"""Load on the HTTP API, stretch by stretch, and what came of each."""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.client import DRAIN_S, Rows, Stream
from benchmarks.samples import Figures, closed_figures, open_figures
from overtone.errors import UnavailableError

LUA_SCRIPT = Path(__file__).parent / "requests.lua"
RAMP = 0.2
"""Share of a closed stretch that is run before it and not counted."""

_OPEN_CONNECTIONS = 4096
_PROMPT = ("nice", "-n", "-10")
"""So that a request is sent when it is due and not when the engine leaves a core: clients have a machine of their own.
Without the right to it (root) `nice` says so and runs the command all the same."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running server."""

    url: str
    """Root of the API."""
    key_header: str
    key: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stretch of closed-loop load."""

    requests: int
    texts_per_s: float
    p50_ms: float
    p99_ms: float
    client_cpu_s: float
    """Processor time of the load generator, its start included."""
    generator: str


class Load:
    """Requests to one path, prepared once."""

    def __init__(self, target: Target, path: str, bodies: list[dict[str, Any]], texts: int, folder: Path) -> None:
        """`bodies` have `texts` texts each and are sent in turn. `folder` is private to this run."""
        self._target = target
        self._path = path
        self.texts = texts
        self.generator = "wrk" if texts == 1 and shutil.which("wrk") else "asyncio"
        """wrk uses less of the processor for each request; where few large ones are sent it measures too coarsely,
        because it counts what was under way at the end for neither side."""
        self._folder = Path(tempfile.mkdtemp(prefix="load-", dir=folder))
        self._bodies = self._folder / "bodies.jsonl"
        self._headers = self._folder / "headers"
        with self._bodies.open("w", encoding="utf-8") as file:
            for body in bodies:
                file.write(json.dumps(body, ensure_ascii=False) + "\n")
        self._headers.touch(mode=0o600)
        self._headers.write_text(f"Content-Type: application/json\n{target.key_header}: {target.key}\n")

    def run(self, connections: int, seconds: float) -> Outcome:
        """Closed loop: send requests for `seconds` over `connections` connections.

        Raises:
            UnavailableError: not every request was answered with 200.
        """
        cpu_before = _children_cpu_s()
        figures = self._wrk(connections, seconds) if self.generator == "wrk" else self._asyncio(connections, seconds)
        if set(figures.statuses) != {"200"}:
            raise UnavailableError(
                f"{self._path} at {connections} connections: statuses {figures.statuses} (0: no answer); "
                "a rate that counts refusals says nothing"
            )
        return Outcome(
            requests=figures.requests,
            texts_per_s=round(figures.requests_per_s * self.texts, 2),
            p50_ms=figures.p50_ms,
            p99_ms=figures.p99_ms,
            client_cpu_s=round(_children_cpu_s() - cpu_before, 3),
            generator=self.generator,
        )

    def run_open(self, texts_per_s: float, seconds: float) -> Figures:
        """Open loop: requests due at random at `texts_per_s`, as a Poisson process has them; refusals are counted."""
        ramp = seconds * RAMP
        phases = ((texts_per_s / self.texts, seconds + ramp),)
        rows = play(self._target, [self.stream("open", phases)], self._folder)["open"]
        return open_figures(rows, ramp, seconds + ramp)

    def stream(
        self, name: str, phases: tuple[tuple[float, float], ...], connections: int = _OPEN_CONNECTIONS
    ) -> Stream:
        """These requests as a stream, for `play`."""
        return Stream(name, self._full_path, str(self._bodies), str(self._headers), connections, phases)

    @property
    def _full_path(self) -> str:
        return urlsplit(self._target.url).path + self._path

    def _asyncio(self, connections: int, seconds: float) -> Figures:
        stream = self.stream("closed", ((0.0, seconds * (1 + RAMP)),), connections)
        return closed_figures(play(self._target, [stream], self._folder)["closed"], connections, seconds * RAMP)

    def _wrk(self, connections: int, seconds: float) -> Figures:
        options = ["--threads", "1", "--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"]
        files = [str(self._bodies), str(self._headers)]
        address = self._target.url + self._path
        command = ["wrk", *options, "--timeout", "30s", "--script", str(LUA_SCRIPT), address, "--", *files]
        # With room to spare: the last requests end after `seconds`.
        said = json.loads(_output_of(command, seconds + 120).strip().splitlines()[-1])
        statuses = {"200": said["requests"] - said["refused"], "other": said["refused"], "0": said["failed"]}
        return Figures(
            requests=said["requests"],
            requests_per_s=said["requests_per_s"],
            p50_ms=said["p50_ms"],
            p99_ms=said["p99_ms"],
            max_ms=said["max_ms"],
            statuses={status: count for status, count in statuses.items() if count},
        )


def play(target: Target, streams: Sequence[Stream], folder: Path) -> dict[str, Rows]:
    """Send all `streams` at once from one process; what came of each request, by stream (see `benchmarks.client`)."""
    parts = urlsplit(target.url)
    plan, output = folder / "plan.json", folder / "rows.npz"
    content = {
        "host": parts.hostname or "127.0.0.1",
        "port": parts.port or 80,
        "streams": [asdict(stream) for stream in streams],
    }
    plan.write_text(json.dumps(content), encoding="utf-8")
    longest = max(sum(seconds for _, seconds in stream.phases) for stream in streams)
    _output_of([sys.executable, "-m", "benchmarks.client", str(plan), str(output)], longest + DRAIN_S + 80)
    with np.load(output) as arrays:
        return {stream.name: arrays[stream.name] for stream in streams}


def single_bodies(texts: list[str]) -> list[dict[str, Any]]:
    """One text a request, as `/predict` takes it."""
    return [{"text": text} for text in texts]


def in_groups(texts: list[str], size: int) -> list[list[str]]:
    """Full groups of `size` only, because a short last one would count as a full one; few texts are repeated."""
    repeated = texts * (-(-size // len(texts)))
    return [repeated[at : at + size] for at in range(0, len(repeated) - size + 1, size)]


def batch_bodies(texts: list[str], size: int) -> list[dict[str, Any]]:
    """`size` texts a request, as `/predict/batch` takes them."""
    return [{"texts": group} for group in in_groups(texts, size)]


def _output_of(command: list[str], timeout_s: float) -> str:
    result = subprocess.run([*_PROMPT, *command], capture_output=True, text=True, timeout=timeout_s, check=False)
    if result.returncode:
        raise UnavailableError(f"The load generator failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
