"""One stretch of load on the HTTP API, and what came of it."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from overtone.errors import UnavailableError

LUA_SCRIPT = Path(__file__).parent / "requests.lua"


@dataclass(frozen=True, slots=True)
class Target:
    """A running server."""

    url: str
    """Root of the API."""
    key_header: str
    key: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stretch of load."""

    requests: int
    texts_per_s: float
    p50_ms: float
    p99_ms: float
    client_cpu_s: float
    """Processor time of the load generator, its start included."""
    generator: str


class Load:
    """Requests to one path, prepared once."""

    def __init__(self, target: Target, path: str, texts: list[str], *, batch: int | None, folder: Path) -> None:
        """`batch` texts a request, or with None the one text of `/predict`. `folder` is private to this run."""
        self._target = target
        self._path = path
        self._texts_a_request = batch or 1
        self.generator = "wrk" if batch is None and shutil.which("wrk") else "asyncio"
        """wrk uses less of the processor for each request; see `benchmarks.client` for where it measures worse."""
        name = path.strip("/").replace("/", "_")
        self._bodies = folder / f"{name}.jsonl"
        self._headers = folder / f"{name}.headers"
        with self._bodies.open("w", encoding="utf-8") as file:
            for body in _bodies(texts, batch):
                file.write(json.dumps(body, ensure_ascii=False) + "\n")
        self._headers.touch(mode=0o600)
        self._headers.write_text(f"Content-Type: application/json\n{target.key_header}: {target.key}\n")

    def run(self, connections: int, seconds: float) -> Outcome:
        """Send requests for `seconds` over `connections` connections.

        Raises:
            UnavailableError: not every request was answered with 200.
        """
        cpu_before = _children_cpu_s()
        command = self._wrk(connections, seconds) if self.generator == "wrk" else self._asyncio(connections, seconds)
        # With room to spare: the last requests end after `seconds`.
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
        lines = result.stdout.strip().splitlines()
        if result.returncode or not lines:
            raise UnavailableError(f"The load generator failed: {result.stderr.strip() or result.stdout.strip()}")
        figures = json.loads(lines[-1])
        if figures["refused"] or figures["failed"] or not figures["requests"]:
            raise UnavailableError(
                f"{self._path}: of {figures['requests']} requests {figures['refused']} were not answered with 200 "
                f"and {figures['failed']} failed; a rate that counts refusals says nothing"
            )
        return Outcome(
            requests=figures["requests"],
            texts_per_s=round(figures["requests_per_s"] * self._texts_a_request, 2),
            p50_ms=figures["p50_ms"],
            p99_ms=figures["p99_ms"],
            client_cpu_s=round(_children_cpu_s() - cpu_before, 3),
            generator=self.generator,
        )

    def _wrk(self, connections: int, seconds: float) -> list[str]:
        options = ["--threads", "1", "--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"]
        arguments = ["--", str(self._bodies), str(self._headers)]
        return [
            "wrk",
            *options,
            "--timeout",
            "30s",
            "--script",
            str(LUA_SCRIPT),
            self._target.url + self._path,
            *arguments,
        ]

    def _asyncio(self, connections: int, seconds: float) -> list[str]:
        parts = urlsplit(self._target.url)
        address = [parts.hostname or "127.0.0.1", str(parts.port or 80), parts.path + self._path]
        files = [str(self._bodies), str(self._headers)]
        return [sys.executable, "-m", "benchmarks.client", *address, str(connections), str(seconds), *files]


def _bodies(texts: list[str], batch: int | None) -> list[dict[str, object]]:
    if batch is None:
        return [{"text": text} for text in texts]
    # Full requests only: a short last one would count as a full one.
    repeated = texts * (-(-batch // len(texts)))
    return [{"texts": repeated[at : at + batch]} for at in range(0, len(repeated) - batch + 1, batch)]


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
