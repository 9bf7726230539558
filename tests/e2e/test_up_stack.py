"""The whole stack as `overtone up` starts it: it recovers from any killed part, loses nothing and leaves nothing."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest

from overtone.cli.cleanup import embedded_postgres, stop_home
from overtone.cli.processes import is_gone, marked_processes
from overtone.cli.state import RunFolder
from overtone.ports import free_ports
from serve.environment import haproxy_pids, runtime_folder

pytestmark = pytest.mark.timeout(600)

START_S = 150.0
RECOVERY_S = 30.0
GONE_S = 30.0


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> float:
    """Seconds until `condition` held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - began


class Stack:
    """The stack of one home, driven through the command line as a user would."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.events: list[dict[str, Any]] = []
        self.process: subprocess.Popen[str] | None = None
        self._seen: set[psutil.Process] = set()
        unset = {"TWITTER_BEARER_TOKEN", "X_API_BASE_URL", "DATABASE_URL", "OVERTONE_API_KEY", "API_HOST"}
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        self.environment |= {"OVERTONE_HOME": str(home), "API_PORT": str(self.port)}

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "overtone.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def up(self, *arguments: str) -> None:
        """Start `overtone up --json` and return when it says that all is up."""
        self.events = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "overtone.cli", "up", "--json", "--no-dashboard", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        wait_until(lambda: self.event("stack.ready") or self.exit_status is not None, START_S, "the stack to be up")
        assert self.event("stack.ready"), self.events
        self.remember()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self.events.append(json.loads(line))
                    continue
                self.events.append({"event": "text", "line": line})

    @property
    def exit_status(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def event(self, name: str) -> dict[str, Any] | None:
        return next((event for event in reversed(self.events) if event["event"] == name), None)

    def remember(self) -> None:
        """Note every process there is now, so that `is_gone` can look for it by more than its mark."""
        self._seen |= set(marked_processes(self.home))
        postgres = embedded_postgres(self.home).pid
        if postgres:
            self._seen.add(psutil.Process(postgres))

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in marked_processes(self.home):
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith(title):
                    found.append(process)
        return found

    def stats(self) -> dict[str, int]:
        """Posts and predictions stored; nothing while the API or the database is away."""
        key = (self.home / "api_key").read_text().strip()
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            answer = httpx.get(f"{self.url}/stats?newest=1", headers={"X-API-Key": key}, timeout=5, trust_env=False)
            if answer.status_code == 200:
                figures = answer.json()
                return {"posts": figures["posts"], "predictions": figures["predictions"]}
        return {}

    def flows(self) -> Callable[[], bool]:
        """A condition: both posts and predictions have grown since this call."""
        wait_until(lambda: self.stats() or self.exit_status is not None, RECOVERY_S, "the API to answer /stats")
        before = self.stats() or {"posts": 0, "predictions": 0}
        return lambda: all(self.stats().get(name, 0) > count + 20 for name, count in before.items())

    def leftovers(self) -> list[str]:
        """Whatever of this home still runs or listens."""
        left = [str(process) for process in (*marked_processes(self.home), *self._seen) if not is_gone(process)]
        left += [f"haproxy {pid}" for pid in haproxy_pids(runtime_folder(self.home))]
        left += ["PostgreSQL"] if embedded_postgres(self.home).is_running() else []
        with socket.socket() as probe:
            left += [f"port {self.port}"] if probe.connect_ex(("127.0.0.1", self.port)) == 0 else []
        return left

    def close(self) -> None:
        """Stop whatever a failed test left."""
        state = RunFolder(self.home).load()
        supervisor = state.supervisor.alive() if state else None
        if supervisor:
            supervisor.kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        folder = RunFolder(self.home)
        folder.lock(GONE_S)
        stop_home(self.home, folder)
        folder.unlock()
        shutil.rmtree(runtime_folder(self.home), ignore_errors=True)


@pytest.fixture
def stack() -> Iterator[Stack]:
    home = Path(tempfile.mkdtemp(prefix="overtone-e2e-", dir="/tmp"))
    made = Stack(home)
    yield made
    try:
        made.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def database_rows(home: Path, statement: str) -> list[Any]:
    async def ask() -> list[Any]:
        connection = await asyncpg.connect(embedded_postgres(home).url)
        try:
            return [row[0] for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    return asyncio.run(ask())


def simulator_url(stack: Stack) -> str:
    state = RunFolder(stack.home).load()
    assert state is not None
    address = next(part.address for part in state.parts if part.name == "simulator")
    return address.split(" at ")[1]


def check_what_it_prints(stack: Stack) -> None:
    ready = stack.event("stack.ready")
    assert ready is not None
    assert ready["source"] == "simulator"
    said = subprocess.run(
        ["bash", "-c", ready["addresses"]["Try it"]], capture_output=True, text=True, check=True, timeout=30
    )
    assert json.loads(said.stdout)["label"] == "positive"
    with httpx.Client(base_url=stack.url, trust_env=False, timeout=10) as browser:
        assert browser.get("/session").status_code == 401
        assert browser.get(ready["addresses"]["Page"]).status_code == 303
        assert browser.get("/session").status_code == 204
        assert browser.get("/").status_code == 200
    assert (stack.home / "api_key").stat().st_mode & 0o777 == 0o600


def check_recoveries(stack: Stack) -> dict[str, float]:
    """Kill one part after the other while posts flow; seconds until each was back."""
    took = {}
    for title in ("ray::IngestActor", "ray::ServeReplica"):
        before = {process.pid for process in stack.processes(title)}
        assert before, title
        flows = stack.flows()
        os.kill(min(before), signal.SIGKILL)

        def is_back(title: str = title, before: set[int] = before, flows: Callable[[], bool] = flows) -> bool:
            now = {process.pid for process in stack.processes(title)}
            return len(now) == len(before) and now != before and flows()

        took[title] = wait_until(is_back, RECOVERY_S, f"{title} to come back")
    killed = embedded_postgres(stack.home).pid
    assert killed is not None
    flows = stack.flows()
    os.kill(killed, signal.SIGKILL)
    took["postgres"] = wait_until(
        lambda: embedded_postgres(stack.home).pid not in {None, killed} and flows(),
        RECOVERY_S,
        "PostgreSQL to come back",
    )
    return took


def check_every_post_once(stack: Stack) -> None:
    simulator = simulator_url(stack)

    def sent() -> list[int]:
        return [int(each) for each in httpx.get(f"{simulator}/simulator/ledger", trust_env=False).json()["ids"]]

    wait_until(lambda: len(sent()) > 1000, 60, "more than 1,000 posts to be sent")
    httpx.post(f"{simulator}/simulator/faults", json={"kind": "silence"}, trust_env=False).raise_for_status()
    ledger = sent()

    def has_caught_up() -> bool:
        return len(database_rows(stack.home, "SELECT post_id FROM overtone.predictions")) >= len(ledger)

    wait_until(has_caught_up, 60, "every post to have its prediction")
    posts = Counter(database_rows(stack.home, "SELECT post_id FROM overtone.posts"))
    predictions = Counter(database_rows(stack.home, "SELECT post_id FROM overtone.predictions"))
    assert posts == Counter(ledger)
    assert predictions == Counter(ledger)
    assert database_rows(stack.home, "SELECT count(*) FROM overtone.dead_letters") == [0]


def check_the_commands(stack: Stack) -> None:
    status = json.loads(stack.run("status", "--json", "--link").stdout)
    assert status["running"]
    assert status["phase"] == "ready"
    assert all(part["alive"] is not False for part in status["parts"].values())
    assert httpx.get(status["link"], trust_env=False).status_code == 303
    again = stack.run("up")
    assert again.returncode == 7
    assert "runs already" in again.stderr
    assert "up to date" in stack.run("db", "upgrade").stdout
    assert stack.run("db", "check").returncode == 0
    texts = stack.home / "texts.csv"
    texts.write_text("id,text\n" + "".join(f"{number},I love this\n" for number in range(600)) + "600,\n")
    output = stack.home / "out.jsonl"
    done = stack.run("predict", "--file", str(texts), "--output", str(output))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(601))
    assert {line.get("label") for line in lines[:600]} == {"positive"}
    assert "error" in lines[600]


def test_any_part_may_die_and_every_post_is_stored_and_predicted_once(stack: Stack) -> None:
    stack.up("--rate", "40")
    check_what_it_prints(stack)
    wait_until(stack.flows(), RECOVERY_S, "posts to flow")
    check_the_commands(stack)
    took = check_recoveries(stack)
    print({part: round(seconds, 1) for part, seconds in took.items()})  # noqa: T201  (shown with -rP)
    stack.remember()
    check_every_post_once(stack)

    assert stack.process is not None
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0
    assert stack.leftovers() == []
    last = stack.event("stack.stopped")
    assert last is not None
    assert last["posts_stored"] == last["predictions_stored"]


def test_a_killed_up_leaves_nothing_and_the_next_one_works(stack: Stack) -> None:
    stack.up()
    assert stack.process is not None
    stack.process.kill()
    stack.process.wait()
    wait_until(lambda: not stack.leftovers(), GONE_S, "the guard to stop everything")
    assert stack.run("down").returncode == 0
    assert stack.leftovers() == []

    assert stack.run("up", "--detach", "--no-dashboard").returncode == 0
    stack.remember()
    state = RunFolder(stack.home).load()
    assert state is not None
    supervisor = psutil.Process(state.supervisor.pid)
    guard = next(child for child in supervisor.children() if "overtone.cli.guard" in child.cmdline())
    guard.kill()
    supervisor.kill()
    assert stack.leftovers() != []

    done = stack.run("up", "--for", "8s", "--json", "--rate", "100", "--no-dashboard")
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["posts_stored"] == last["predictions_stored"] > 500
    assert stack.leftovers() == []


def test_a_killed_up_and_guard_are_cleared_up_by_down(stack: Stack) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "overtone.cli", "up", "--json", "--no-dashboard"],
        env=stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def half_up() -> bool:
        return len(marked_processes(stack.home)) >= 3 and embedded_postgres(stack.home).is_running()

    wait_until(half_up, START_S, "the first processes")
    stack.remember()
    for child in psutil.Process(process.pid).children():
        if "overtone.cli.guard" in child.cmdline():
            child.kill()
    process.kill()
    process.wait()
    assert stack.leftovers() != []
    assert stack.run("down").returncode == 0
    assert stack.leftovers() == []
