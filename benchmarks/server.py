"""A server of the benchmark's own: `overtone up` in a home that is thrown away after, on a port of its own."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from benchmarks.load import Target
from overtone.errors import UnavailableError
from overtone.ports import free_ports
from overtone.settings import Settings, environment_for

# One post in two minutes: the stack is whole, as users run it, and the ingest actor leaves the cores alone.
_SIMULATOR_RATE = "0.01"
_START_S = 240
_STOP_S = 120


@contextlib.contextmanager
def own_server(settings: Settings, home: Path) -> Iterator[Target]:
    """Start the stack with its state in `home`, stop it whole at the end.

    Raises:
        UnavailableError: it did not start; the message holds what it said.
    """
    port = free_ports(1)[0]
    environment = _environment(settings, home, port)
    try:
        _command(["up", "--detach"], environment, home, _START_S)
        url = f"http://127.0.0.1:{port}"
        _await_ready(url)
        yield Target(url, "X-API-Key", (home / "api_key").read_text(encoding="utf-8").strip())
    finally:
        _command(["down"], environment, home, _STOP_S)


def _environment(settings: Settings, home: Path, port: int) -> dict[str, str]:
    chosen = {
        "OVERTONE_HOME": str(home),
        "API_HOST": "127.0.0.1",
        "API_PORT": str(port),
        "SIMULATOR_RATE": _SIMULATOR_RATE,
        "LOG_LEVEL": "WARNING",
    }
    environment = environment_for(settings, **chosen)
    # The user's own stores and token are not for measuring with.
    for name in ("DATABASE_URL", "REDIS_URL", "TWITTER_BEARER_TOKEN", "OVERTONE_API_KEY", "API_KEY_HEADER"):
        environment.pop(name, None)
    if settings.bundle is not None:
        environment["BUNDLE"] = str(settings.bundle.absolute())
    return environment


def _command(arguments: list[str], environment: dict[str, str], home: Path, timeout_s: float) -> None:
    # To a file: a pipe would stay open for as long as anything that the command leaves running.
    said = home / "benchmark.log"
    try:
        with said.open("wb") as log:
            status = subprocess.run(
                [sys.executable, "-m", "overtone.cli", *arguments],
                env=environment,
                cwd=home,  # where there is no `.env` of the user's
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=timeout_s,
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        status = -1
    if status:
        reason = f"ended with {status}" if status > 0 else f"was not done after {timeout_s:.0f} s"
        words = said.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        raise UnavailableError(f"`overtone {' '.join(arguments)}` {reason}:\n{words}")


def _await_ready(url: str) -> None:
    for attempt in Retrying(
        stop=stop_after_delay(60), wait=wait_fixed(0.2), retry=retry_if_exception_type(httpx.HTTPError), reraise=True
    ):
        with attempt:
            httpx.get(f"{url}/ready", timeout=5.0).raise_for_status()
