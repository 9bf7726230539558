"""`python -m benchmarks.jobs`: a job of a million short texts while its consumers and Redis are killed.

It runs the product as `overtone up` does, with a Redis of its own that keeps its append-only file, uploads the texts,
kills with SIGKILL at even steps of the progress, and then compares the result with the upload line by line. It prints
the account as JSON and exits with 1 if that does not add up.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from overtone.cli.processes import marked_processes
from overtone.ports import free_ports

CONSUMER = "ServeReplica:overtone-jobs:"
_WORDS = ("love it", "hate it", "so so", "great day", "worst ever", "it is ok", "what a song", "never again")
_START_S = 240.0
_AWAY_S = 2.0
"""How long Redis stays away."""
_LOOK_S = 0.5
_ANSWER_S = 90.0
_UNSET = {"TWITTER_BEARER_TOKEN", "X_API_BASE_URL", "DATABASE_URL", "OVERTONE_API_KEY", "API_HOST", "JOBS_FOLDER"}


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried."""

    texts: int = 1_000_000
    consumer_kills: int = 3
    redis_kills: int = 3
    patience_s: float = 7200.0


@dataclass(slots=True)
class Account:
    """What came of it."""

    texts: int
    state: str = "not submitted"
    lines: int = 0
    wrong_lines: int = 0
    """Lines of the result that are missing, doubled, out of order or with an error."""
    consumers_killed: int = 0
    redis_killed: int = 0
    upload_s: float = 0.0
    seconds: float = 0.0
    """From the upload to the end of the job."""
    texts_per_s: float = 0.0
    memory_mib: dict[str, dict[str, float]] = field(default_factory=dict)
    """Resident memory by kind of process: of the first third of the samples and of the last, the highest."""
    workers_answering: int = 0
    """To `celery inspect ping`."""

    @property
    def is_whole(self) -> bool:
        """Whether each text has one line, in its place."""
        return self.state == "succeeded" and self.lines == self.texts and not self.wrong_lines

    @property
    def is_flat(self) -> bool:
        """Whether memory at the end is what it was at the beginning, but for a tenth and 64 MiB."""
        return all(one["last"] <= one["first"] * 1.1 + 64 for one in self.memory_mib.values())


class Redis:
    """A redis-server that keeps every task it was given, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError("redis-server is not installed (Debian: apt-get install redis-server)")
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([program, *options, "--appendonly", "yes"], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > deadline:
                raise TimeoutError("redis-server did not start")
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class World:
    """A home with the product running in it."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.redis = Redis(folder)
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
        self.environment = environment | {
            "OVERTONE_HOME": str(self.home),
            "API_PORT": str(self.port),
            "REDIS_URL": self.redis.url,
        }

    def __enter__(self) -> "World":
        try:
            self.redis.start()
            self._overtone("up", "--detach", "--no-dashboard", "--rate", "0.01")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._overtone("down")
        finally:
            self.redis.kill()

    def client(self) -> httpx.Client:
        key = (self.home / "api_key").read_text().strip()
        return httpx.Client(base_url=self.url, headers={"X-API-Key": key}, timeout=120.0, trust_env=False)

    def consumers(self) -> list[psutil.Process]:
        """The consumers that run."""
        return self._named(CONSUMER)

    def memory(self) -> Iterator[tuple[str, float]]:
        """Resident memory in MiB of each process that jobs pass through."""
        for kind, title in (("consumer", CONSUMER), ("api", "ServeReplica:overtone:")):
            for process in self._named(title):
                with contextlib.suppress(psutil.Error):
                    yield kind, process.memory_info().rss / 2**20
        with contextlib.suppress(psutil.Error):
            if self.redis._process is not None:
                yield "redis", psutil.Process(self.redis._process.pid).memory_info().rss / 2**20

    def workers(self) -> int:
        """How many workers answer `celery inspect ping`."""
        command = [sys.executable, "-m", "celery", "-A", "serve.broker", "inspect", "ping", "--json", "-t", "10"]
        said = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        ).stdout
        try:
            return len(json.loads(said))
        except ValueError:
            return 0

    def _named(self, title: str) -> list[psutil.Process]:
        found = []
        for process in marked_processes(self.home):
            with contextlib.suppress(psutil.Error, IndexError):
                if title in process.cmdline()[0]:
                    found.append(process)
        return found

    def _overtone(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "overtone.cli", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=_START_S
        )
        if done.returncode:
            raise RuntimeError(f"overtone {arguments[0]}: {done.stdout}{done.stderr}")


def live_through(world: World, trial: Trial) -> Account:
    """Do the job of `trial` in `world`, killing on the way."""
    account = Account(trial.texts)
    with world.client() as client:
        began = time.monotonic()
        headers = {"Content-Type": "application/x-ndjson"}
        answer = client.post("/jobs", content=_upload(trial.texts), headers=headers)
        answer.raise_for_status()
        account.upload_s = round(time.monotonic() - began, 1)
        job_id = answer.json()["job_id"]
        account.state = _watch(world, client, job_id, trial, account)
        account.seconds = round(time.monotonic() - began, 1)
        account.texts_per_s = round(trial.texts / account.seconds, 1)
        # A worker listens again a moment after the Redis it lost has come back.
        deadline = time.monotonic() + _ANSWER_S
        while not account.workers_answering and time.monotonic() < deadline:
            account.workers_answering = world.workers()
        _compare(client, job_id, account)
    return account


def _upload(texts: int) -> Iterator[bytes]:
    """The lines, a few thousand a piece."""
    for start in range(0, texts, 5_000):
        lines = [
            json.dumps({"id": f"n-{number}", "text": f"{_WORDS[number % len(_WORDS)]} {number}"})
            for number in range(start, min(start + 5_000, texts))
        ]
        yield ("\n".join(lines) + "\n").encode()


def _watch(world: World, client: httpx.Client, job_id: str, trial: Trial, account: Account) -> str:
    """Kill at even steps of the progress until the job has ended; its state then."""
    kills = ["consumer", "redis"] * max(trial.consumer_kills, trial.redis_kills)
    wanted = {"consumer": trial.consumer_kills, "redis": trial.redis_kills}
    kinds = []
    for kind in kills:
        if wanted[kind]:
            wanted[kind] -= 1
            kinds.append(kind)
    steps = [(number + 1) / (len(kinds) + 1) for number in range(len(kinds))]
    samples: list[tuple[str, float]] = []
    deadline = time.monotonic() + trial.patience_s
    state, progress = "queued", 0.0
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            job = client.get(f"/jobs/{job_id}").json()
            state, progress = job["state"], job["done"] / job["total"]
        if state not in {"queued", "running"}:
            break
        if steps and progress >= steps[0]:
            steps.pop(0)
            _kill(world, kinds.pop(0), account)
        samples += world.memory()
        time.sleep(_LOOK_S)
    for kind in {kind for kind, _ in samples}:
        sizes = [size for each, size in samples if each == kind]
        third = max(1, len(sizes) // 3)
        account.memory_mib[kind] = {"first": round(max(sizes[:third]), 1), "last": round(max(sizes[-third:]), 1)}
    return state


def _kill(world: World, kind: str, account: Account) -> None:
    if kind == "redis":
        world.redis.kill()
        time.sleep(_AWAY_S)
        world.redis.start()
        account.redis_killed += 1
        return
    for process in world.consumers():
        with contextlib.suppress(psutil.Error):
            process.kill()
            account.consumers_killed += 1


def _compare(client: httpx.Client, job_id: str, account: Account) -> None:
    with client.stream("GET", f"/jobs/{job_id}/result") as answer:
        if answer.status_code != 200:
            return
        for number, line in enumerate(answer.iter_lines()):
            row: dict[str, Any] = json.loads(line)
            is_right = row["line"] == number + 1 and row["id"] == f"n-{number}" and bool(row.get("label"))
            account.lines += 1
            account.wrong_lines += not is_right


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument("--texts", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--consumer-kills", type=int, default=3, help="kill -9 of all consumers (default: 3)")
    parser.add_argument("--redis-kills", type=int, default=3, help="kill -9 of Redis (default: 3)")
    parser.add_argument("--patience", type=float, default=7200.0, help="seconds to wait for the end (default: 7200)")
    given = parser.parse_args(arguments)
    trial = Trial(given.texts, given.consumer_kills, given.redis_kills, given.patience)
    with tempfile.TemporaryDirectory(prefix="overtone-jobs-", dir="/tmp") as folder, World(Path(folder)) as world:
        account = live_through(world, trial)
    shown = {**asdict(account), "is_whole": account.is_whole, "is_flat": account.is_flat}
    Console().print_json(json.dumps(shown))
    return 0 if account.is_whole and account.is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
