"""The whole serving stack, once: Ray, HAProxy and two replicas on the default bundle, and PostgreSQL for the keys."""

import asyncio
import contextlib
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest

from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, load_bundle, write_bundle
from overtone.db import keys
from overtone.db.database import Database
from overtone.engine import open_engine
from overtone.schema import MAX_BATCH_TEXTS, MAX_TEXT_CHARS
from overtone.settings import load_settings
from serve.environment import haproxy_pids, runtime_folder, serve_environment

SECRET = "ovt_cluster-test"
FIRST_PORT = 31500
LIKED = "I love this"
DISLIKED = "I hate this, it is horrible and awful"

_DEPLOY = """
import json, sys
import ray
from serve.app import ServeArgs, deploy
arguments = json.loads(sys.argv[1])
ray.init(address=arguments["address"], namespace="overtone", log_to_driver=False)
deploy(ServeArgs(**arguments["args"]), host="127.0.0.1", port=arguments["port"])
"""

_SWAP = """
import json, sys
import ray
from serve.app import ServeArgs, deploy
arguments = json.loads(sys.argv[1])
ray.init(address=arguments["address"], namespace="overtone", log_to_driver=False)
for number in range(20):
    live = {"bundle": arguments["bundles"][number % 2], "revision": number + 1}
    deploy(ServeArgs(**arguments["args"], live=live), host="127.0.0.1", port=arguments["port"])
"""


@dataclass(frozen=True)
class Stack:
    """A running stack."""

    folder: Path
    port: int
    environment: dict[str, str]
    ray_port: int
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
                if "ServeReplica" in " ".join(process.cmdline()):
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
        address = f"127.0.0.1:{self.ray_port}"
        arguments = {"address": address, "args": args, "port": self.port, "bundles": bundles}
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def serving_bundle() -> Bundle:
    """The bundle in the package, or the one the setting BUNDLE names."""
    return load_bundle(load_settings().bundle)


@pytest.fixture(scope="module")
def other_bundle(serving_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model, less sure of itself."""
    folder = tmp_path_factory.mktemp("other")
    for path in (serving_bundle.model_path, serving_bundle.tokenizer_path):
        shutil.copy(path, folder)
    spec = BundleSpec(
        name="other",
        labels=serving_bundle.labels,
        max_length=serving_bundle.max_length,
        temperature=serving_bundle.temperature * 1.5,
        precision=serving_bundle.precision,
        golden=serving_bundle.golden,
    )
    draft = write_bundle(folder, spec=spec)
    scores = open_engine(draft).classify(TextEncoder(draft).encode([LIKED]))
    return write_bundle(folder, spec=replace(spec, golden=(Golden(LIKED, tuple(map(float, scores[0]))),)))


@pytest.fixture(scope="module")
def stack(postgres_url: str, serving_bundle: Bundle) -> Iterator[Stack]:
    asyncio.run(_import_key(postgres_url))
    home = Path(tempfile.mkdtemp(prefix="ovt-", dir="/tmp"))
    folder = runtime_folder(home)
    metrics_folder = home / "metrics"
    metrics_folder.mkdir()
    stack = Stack(folder, free_port(), {}, free_port(), metrics_folder)
    stack.environment.update(
        os.environ,
        **serve_environment(host="127.0.0.1", folder=folder, first_replica_port=FIRST_PORT),
        OVERTONE_HOME=str(home),
        OVERTONE_TEST_STACK=str(folder),
        DATABASE_URL=postgres_url,
        BUNDLE=str(serving_bundle.path),
        API_PORT=str(stack.port),
        RAY_AUTH_MODE="disabled",
    )
    try:
        _start_ray(stack, home / "ray")
        stack.deploy(replicas=2, metrics_folder=str(metrics_folder))
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


async def _import_key(url: str) -> None:
    database = await Database.open(url, max_size=1)
    await keys.import_key(database, "test", SECRET, ["predict", "read"])
    await database.close()


def _start_ray(stack: Stack, temporary: Path) -> None:
    program = Path(sys.executable).parent / "ray"
    options = {
        "port": stack.ray_port,
        "node-ip-address": "127.0.0.1",
        "include-dashboard": "false",
        "num-cpus": 4,
        "object-store-memory": 80_000_000,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "temp-dir": temporary,
    }
    done = subprocess.run(
        [str(program), "start", "--head", *(f"--{name}={value}" for name, value in options.items())],
        env=stack.environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_texts_are_classified(stack: Stack, serving_bundle: Bundle) -> None:
    with stack.client() as client:
        one = client.post("/predict", json={"text": LIKED})
        many = client.post("/predict/batch", json={"texts": [LIKED, DISLIKED] * 150})

    assert (one.status_code, one.json()["label"]) == (200, "positive")
    assert one.json()["model_version"] == serving_bundle.version
    assert [item["label"] for item in many.json()["predictions"]] == ["positive", "negative"] * 150
    assert len(one.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/predict", json.dumps({"text": "x" * 100_000}).encode(), 422),
        ("/predict", b'{"text": ""}', 422),
        ("/predict/batch", json.dumps({"texts": ["a"] * (MAX_BATCH_TEXTS + 1)}).encode(), 422),
        ("/predict", b'{"text": ', 400),
        ("/predict", b'{"text": 7}', 422),
        ("/predict", b'{"text": "\\ud800"}', 422),
        ("/predict", b'{"text": "a\\u0000b"}', 422),
        ("/predict", b"x" * (65 * 2**20), 413),
    ],
)
def test_hostile_bodies_are_refused_and_the_server_stays_up(stack: Stack, path: str, body: bytes, status: int) -> None:
    with stack.client() as client:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text[:300]
        assert response.json()["errors"][0]["field"]
        assert client.post("/predict", json={"text": "x" * MAX_TEXT_CHARS}).status_code == 200


def test_calls_without_a_key_are_refused(stack: Stack) -> None:
    assert httpx.post(f"{stack.url}/predict", json={"text": LIKED}).status_code == 401


def test_figures_come_from_the_database(stack: Stack) -> None:
    with stack.client() as client:
        assert client.get("/stats").json()["posts"] == 0


def test_metrics_are_the_sum_of_all_replicas(stack: Stack) -> None:
    def count(client: httpx.Client) -> float:
        text = client.get("/metrics").text
        assert re.search(r"^(?!#)(ray|autoscaler|serve)_", text, re.MULTILINE) is None
        found = re.search(r'^http_requests_total\{method="POST",route="/predict",status="200"\} ([\d.]+)$', text, re.M)
        return float(found[1]) if found else 0.0

    with stack.client() as client:
        before = count(client)
    for _ in range(30):  # a connection each, so that both replicas get some
        with stack.client() as client:
            assert client.post("/predict", json={"text": LIKED}).status_code == 200
    with stack.client() as client:
        assert {count(client) for _ in range(6)} == {before + 30}
    written = {path.stem.rpartition("_")[2] for path in stack.metrics_folder.glob("counter_*.db")}
    assert {str(process.pid) for process in stack.replicas()} <= written


def test_nothing_listens_beyond_loopback(stack: Stack) -> None:
    beyond = [
        (process.name(), connection.laddr)
        for process in stack.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip.removeprefix("::ffff:") not in {"127.0.0.1", "::1"}
    ]

    assert beyond == []
    sockets = [path for path in stack.folder.rglob("*") if path.is_socket()]
    assert len(sockets) >= 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in sockets)


@contextlib.contextmanager
def asking(stack: Stack, clients: int = 8) -> Iterator[list[tuple[int, str]]]:
    """Clients that ask all the time; the status and model version of every answer so far."""
    answers: list[tuple[int, str]] = []
    done = threading.Event()

    def ask() -> None:
        with stack.client() as client:
            while not done.is_set():
                response = client.post("/predict", json={"text": LIKED})
                answers.append((response.status_code, response.json().get("model_version", response.text)))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            done.set()
    for client in asking:
        client.result()


@pytest.mark.timeout(600)
def test_twenty_replicas_killed_under_load_fail_only_what_they_held(stack: Stack) -> None:
    large = ["x " * 1000] * 60  # more than HAProxy can send to another replica again
    calls = [("/predict", {"text": LIKED})] * 6 + [("/predict/batch", {"texts": large})] * 2
    answered = dict.fromkeys({path for path, _ in calls}, 0)
    failed: list[httpx.Response] = []
    under_way: list[tuple[float, float]] = []  # when those that failed were sent and answered
    deaths: list[tuple[float, float]] = []  # from the signal until nothing of the process is left
    broken: list[str] = []
    done = threading.Event()

    def ask(path: str, body: dict[str, object]) -> None:
        with stack.client() as client:  # whose time limit is what an answer may take
            while not done.is_set():
                sent = time.monotonic()
                try:
                    answer = client.post(path, json=body)
                except httpx.HTTPError as error:
                    broken.append(f"{path}: {error!r}")
                    continue
                if answer.status_code == 200:
                    answered[path] += 1
                else:
                    failed.append(answer)
                    under_way.append((sent, time.monotonic()))

    with ThreadPoolExecutor(len(calls)) as pool:
        asking = [pool.submit(ask, *call) for call in calls]
        try:
            for _ in range(20):
                until(lambda: len(stack.listening()) == 2 and stack.listening() == stack.up(), 60)
                before = answered["/predict"]
                replica = min(stack.replicas(), key=lambda process: process.pid)
                killed = time.monotonic()
                replica.kill()
                replica.wait(10)
                deaths.append((killed, time.monotonic()))
                until(lambda before=before: answered["/predict"] >= before + 20)
        except (TimeoutError, psutil.TimeoutExpired):
            broken.append(f"nothing is answered any more: {answered}, {[answer.text for answer in failed[-3:]]}")
        finally:
            done.set()
    for client in asking:
        client.result()

    assert broken == []
    assert answered["/predict/batch"] > 20
    shown = [(answer.status_code, answer.headers.get("retry-after"), answer.text) for answer in failed]
    assert {(status, json.loads(text)["code"]) for status, _, text in shown} <= {(503, "unavailable")}, shown
    assert all(retry_after for _, retry_after, _ in shown), shown
    assert {str(answer.request.url.path) for answer in failed} <= {"/predict/batch"}
    strays = [it for it in under_way if not any(it[0] <= gone and killed <= it[1] for killed, gone in deaths)]
    assert strays == []


def is_ready(stack: Stack) -> bool:
    return httpx.get(f"{stack.url}/ready").status_code == 200


def test_another_bundle_is_rolled_out_without_a_new_process_or_a_lost_request(
    stack: Stack, serving_bundle: Bundle, other_bundle: Bundle
) -> None:
    until(lambda: len(stack.replicas()) == 2 and is_ready(stack))
    before = {process.pid for process in stack.replicas()}

    with asking(stack) as answers:
        until(lambda: len(answers) >= 50)
        stack.deploy(replicas=2, metrics_folder=str(stack.metrics_folder), live={"bundle": str(other_bundle.path)})
        answered = len(answers)
        until(lambda: len(answers) >= answered + 50)

    assert [(status, text) for status, text in answers if status != 200] == []
    assert {version for _, version in answers} == {serving_bundle.version, other_bundle.version}
    assert {version for _, version in answers[answered + 8 :]} == {other_bundle.version}
    assert {process.pid for process in stack.replicas()} == before


def test_twenty_swaps_under_load_lose_and_mix_up_nothing(
    stack: Stack, serving_bundle: Bundle, other_bundle: Bundle
) -> None:
    known = {}
    for bundle in (serving_bundle, other_bundle):
        scores = open_engine(bundle).classify(TextEncoder(bundle).encode([LIKED]))[0]
        known[bundle.version] = float(scores.max())
    wrong: list[str] = []
    counts = dict.fromkeys(known, 0)
    done = threading.Event()

    def ask() -> None:
        with stack.client() as client:
            while not done.is_set():
                answer = client.post("/predict", json={"text": LIKED})
                if answer.status_code != 200:
                    wrong.append(f"{answer.status_code} {answer.text[:200]}")
                    continue
                body = answer.json()
                counts[body["model_version"]] += 1
                if abs(body["confidence"] - known[body["model_version"]]) > 2e-3:
                    wrong.append(f"{body['model_version']}: {body['confidence']}")

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        bundles = (str(serving_bundle.path), str(other_bundle.path))
        try:
            stack.deploy(_SWAP, bundles, replicas=2, metrics_folder=str(stack.metrics_folder))
        finally:
            done.set()
    for client in asking:
        client.result()

    assert wrong == []
    assert all(count > 20 for count in counts.values()), counts
    with stack.client() as client:
        models = client.get("/models").json()
    assert (models["revision"], models["champion"]["version"]) == (20, other_bundle.version)


def test_a_stopped_stack_leaves_nothing_behind(stack: Stack) -> None:
    assert haproxy_pids(stack.folder)
    stack.stop()

    assert stack.processes() == []
    assert haproxy_pids(stack.folder) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{stack.url}/health")
