"""The whole serving stack for tests: Ray, HAProxy and replicas on the default bundle, and PostgreSQL for the keys."""

import asyncio
import contextlib
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from overtone.bundle import Bundle
from overtone.db import keys
from overtone.db.database import Database
from overtone.ports import free_ports
from serve.environment import APPLICATION, haproxy_pids, runtime_folder, serve_environment

SECRET = "ovt_cluster-test"
FIRST_PORT = 31500
LIKED = "I love this"
DISLIKED = "I hate this, it is horrible and awful"
LARGE = {"texts": ["x " * 60 + " " * 1000] * 60}
"""A request of more than HAProxy can send to another replica again; some half a second of work."""

_DEPLOY = """
import json, sys
import ray
from serve.app import ServeArgs, deploy
arguments = json.loads(sys.argv[1])
ray.init(address=arguments["address"], namespace="overtone", log_to_driver=False)
deploy(ServeArgs(**arguments["args"]), host="127.0.0.1", port=arguments["port"])
"""


@dataclass(frozen=True)
class Stack:
    """A running stack."""

    folder: Path
    port: int
    environment: dict[str, str]
    ray_port: int
    dashboard_port: int
    metrics_folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"X-API-Key": SECRET}, timeout=30)

    def processes(self) -> list[psutil.Process]:
        """Every process with the mark of this stack in its environment, and every HAProxy of it."""
        marked = []
        for pid in haproxy_pids(self.folder):
            with contextlib.suppress(psutil.Error):  # a reload ends the one before
                marked.append(psutil.Process(pid))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("OVERTONE_TEST_STACK") == str(self.folder) and process.pid != os.getpid():
                    marked.append(process)
        return marked

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{APPLICATION}:" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def listening(self) -> set[int]:
        """The ports on which replicas answer HTTP."""
        ports = set()
        for process in self.replicas():
            with contextlib.suppress(psutil.Error):
                found = process.net_connections(kind="tcp")
                ports |= {it.laddr.port for it in found if it.status == psutil.CONN_LISTEN}
        return {port for port in ports if FIRST_PORT <= port <= FIRST_PORT + 1000}

    def up(self) -> set[int]:
        """The ports of the replicas to which HAProxy sends requests."""
        try:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(str(next(self.folder.rglob("admin.sock"))))
                admin.sendall(b"show stat\n")
                text = b"".join(iter(lambda: admin.recv(65536), b"")).decode().removeprefix("# ")
        except OSError:  # in the middle of a reload
            return set()
        rows = csv.DictReader(text.splitlines())
        return {int(row["addr"].rpartition(":")[2]) for row in rows if row["status"] == "UP" and ":" in row["addr"]}

    def stop(self) -> None:
        """Stop every process, first asking."""
        for send in (psutil.Process.terminate, psutil.Process.kill):
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    send(process)
            with contextlib.suppress(TimeoutError):
                until(lambda: not self.processes(), seconds=3)

    def deploy(self, script: str = _DEPLOY, bundles: tuple[str, ...] = (), **args: object) -> None:
        """Have the application be as `args` (of `serve.app.ServeArgs`) say, by `script`."""
        address = f"127.0.0.1:{self.ray_port}"
        args["metrics_folder"] = str(self.metrics_folder)
        arguments = {"address": address, "args": args, "port": self.port, "bundles": bundles}
        self.run(sys.executable, "-c", script, json.dumps(arguments))

    def await_replicas(self, number: int, seconds: float = 60) -> None:
        """Wait until there are so many replicas, and HAProxy sends requests to all of them and no other."""
        until(
            lambda: len(self.listening()) == len(self.replicas()) == number and self.listening() == self.up(), seconds
        )

    def run(self, *command: str) -> str:
        """What `command` prints, in the environment of this stack; it must end with 0."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=560, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def until(condition: Callable[[], object], seconds: float = 30, every_s: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(every_s)


@dataclass(frozen=True)
class Call:
    """A request that was answered; by a monotonic clock, in seconds."""

    sent: float
    answered: float
    response: httpx.Response

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def version(self) -> str:
        return str(self.response.json()["model_version"])


@contextlib.contextmanager
def asking(
    stack: Stack, clients: int = 8, path: str = "/predict", body: object = None, *, pause_s: float = 0.0
) -> Iterator[list[Call]]:
    """Clients that ask all the time, with a pause between requests; every answer so far.

    What a client cannot put down to an answer, such as a connection that is cut, is raised at the end.
    """
    calls: list[Call] = []
    done = threading.Event()

    def ask() -> None:
        with stack.client() as client:
            while not done.is_set():
                sent = time.monotonic()
                response = client.post(path, json={"text": LIKED} if body is None else body)
                calls.append(Call(sent, time.monotonic(), response))
                done.wait(pause_s)

    with ThreadPoolExecutor(clients) as pool:
        started = [pool.submit(ask) for _ in range(clients)]
        try:
            yield calls
        finally:
            done.set()
    for client in started:
        client.result()


def failures(calls: list[Call]) -> list[str]:
    """What was not answered with 200."""
    return [f"{call.status} {call.response.text[:300]}" for call in calls if call.status != 200]


@contextlib.contextmanager
def started(postgres_url: str, bundle: Bundle, *, has_dashboard: bool = False) -> Iterator[Stack]:
    """A Ray instance in which nothing is served yet, in the environment that Overtone needs."""
    asyncio.run(_import_key(postgres_url))
    home = Path(tempfile.mkdtemp(prefix="ovt-", dir="/tmp"))
    folder = runtime_folder(home)
    metrics_folder = home / "metrics"
    metrics_folder.mkdir()
    api, ray, dashboard = free_ports(3)
    stack = Stack(folder, api, {}, ray, dashboard, metrics_folder)
    stack.environment.update(
        os.environ,
        **serve_environment(host="127.0.0.1", folder=folder, first_replica_port=FIRST_PORT),
        OVERTONE_HOME=str(home),
        OVERTONE_TEST_STACK=str(folder),
        DATABASE_URL=postgres_url,
        BUNDLE=str(bundle.path),
        API_PORT=str(stack.port),
        RAY_AUTH_MODE="disabled",
    )
    try:
        _start_ray(stack, home / "ray", has_dashboard=has_dashboard)
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


async def _import_key(url: str) -> None:
    database = await Database.open(url, max_size=1)
    await keys.import_key(database, "test", SECRET, ["predict", "read"])
    await database.close()


def _start_ray(stack: Stack, temporary: Path, *, has_dashboard: bool) -> None:
    program = Path(sys.executable).parent / "ray"
    client, agent = free_ports(2)
    options = {
        "port": stack.ray_port,
        "node-ip-address": "127.0.0.1",
        "include-dashboard": str(has_dashboard).lower(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": stack.dashboard_port,
        "num-cpus": 4,
        "object-store-memory": 80_000_000,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "temp-dir": temporary,
    }
    stack.run(str(program), "start", "--head", *(f"--{name}={value}" for name, value in options.items()))
