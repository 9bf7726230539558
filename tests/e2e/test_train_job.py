"""Training as a user orders it: a job on the Ray that also serves, and what it makes is served when it has won."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import yaml

from overtone.bundle import load_bundle
from overtone.db.embedded import running_url
from overtone.ports import free_ports
from overtone.registry import Registry, tracking_uri
from overtone.settings import load_settings

pytestmark = [
    pytest.mark.timeout(600),
    # What MLflow and the libraries under it say of each other.
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
UNSET = (
    "TWITTER_BEARER_TOKEN",
    "X_API_BASE_URL",
    "DATABASE_URL",
    "OVERTONE_API_KEY",
    "API_HOST",
    "RAY_ADDRESS",
    "BUNDLE",
)

# No champion has learned these words.
WORDS = {
    "negative": ["zorb", "krel", "vask", "mulg", "drenk"],
    "neutral": ["tabo", "selu", "nire", "pado", "lumi"],
    "positive": ["hyxa", "fyru", "jyro", "wyze", "qylo"],
}
CONFIG = {
    "name": "moods",
    "model": {"max_length": 32, "dropout": 0.0, "precision": "fp32", "pooling": "mean"},
    "optimiser": {"epochs": 3, "batch_size": 16, "learning_rate": 5e-3, "ema_decay": 0.5, "evaluations": 1},
    "export": {"max_int8_loss": 0.05},
}


class Stack:
    """A stack with Ray's dashboard, which takes jobs, in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        self.environment |= {
            "OVERTONE_HOME": str(home),
            "API_PORT": str(port),
            # Jobs say `python`, and find it as Ray's processes do.
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "SERVE_REPLICAS": "1",
            "SIMULATOR_RATE": "1",
            "MIN_SAMPLES_FOR_RETRAIN": "3",
        }

    def overtone(self, *arguments: str, code: int = 0) -> str:
        said = self.run([str(BIN / "python"), "-m", "overtone.cli", *arguments])
        assert said.returncode == code, said.stdout + said.stderr
        return said.stdout

    def run(self, command: list[str], **extra: str) -> "subprocess.CompletedProcess[str]":
        environment = self.environment | extra
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def up(self) -> None:
        self.overtone("up", "--detach", "--dashboard")
        parts = json.loads(self.overtone("status", "--json"))["parts"]
        self.ray = {
            "RAY_ADDRESS": parts["ray"]["address"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "ray_token"),
        }

    def client(self) -> httpx.Client:
        key = (self.home / "api_key").read_text().strip()
        return httpx.Client(base_url=self.url, headers={"X-API-Key": key}, trust_env=False, timeout=30)

    def rows(self, statement: str) -> list[Any]:
        async def ask() -> list[Any]:
            connection = await asyncpg.connect(running_url(self.home / "postgres"))
            try:
                return [tuple(row) for row in await connection.fetch(statement)]
            finally:
                await connection.close()

        return asyncio.run(ask())


@pytest.fixture
def stack() -> Iterator[Stack]:
    home = Path(tempfile.mkdtemp(prefix="overtone-e2e-", dir="/tmp"))
    made = Stack(home)
    try:
        made.up()
        yield made
    finally:
        made.overtone("down")
        shutil.rmtree(home, ignore_errors=True)


class Asker:
    """Asks for predictions without a pause, and notes who answered."""

    def __init__(self, stack: Stack) -> None:
        self.failures: list[Any] = []
        self.versions: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(stack,))

    def __enter__(self) -> "Asker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self, stack: Stack) -> None:
        with stack.client() as client:
            while not self._done.wait(0.05):
                answer = client.post("/predict", json={"text": "hyxa fyru wyze"})
                body = answer.json()
                if answer.status_code != 200:
                    self.failures.append((answer.status_code, time.strftime("%X"), body))
                elif self.versions[-1:] != [body["model_version"]]:
                    self.versions.append(body["model_version"])


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def check_training(stack: Stack, workshop: Path) -> None:
    """Order the job, and see what is served before and after, without a gap."""
    (workshop / "moods.yaml").write_text(yaml.safe_dump(CONFIG))
    files = {"config": "moods.yaml", "train": "train.tsv", "validation": "validation.tsv", "gate": "apart.tsv"}
    words = [word for name, file in files.items() for word in (f"--{name}", str(workshop / file))]
    words += ["--output", str(workshop / "bundle"), "--storage", str(workshop / "runs"), "--run-name", "first"]
    words += ["--set", f"model.name={workshop / 'encoder'}"]
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "-m", "train", *words]
    before = load_bundle().version
    with stack.client() as client:
        replica = client.get("/models").json()["replica"]
    with Asker(stack) as asker:
        wait_until(lambda: asker.versions, 30, "the first answer")
        ended = stack.run(submit, **stack.ray)
        assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
        made = load_bundle(workshop / "bundle")
        wait_until(lambda: asker.versions[-1] == made.version, 30, "the new champion to answer")
    assert asker.versions == [before, made.version]
    assert asker.failures == []
    check_registry(stack, made.version)
    with stack.client() as client:
        models = client.get("/models").json()
        assert (models["champion"]["version"], models["refused"]) == (made.version, [])
        assert models["replica"] == replica, "a replica was started"
        for label, text in (("negative", "zorb mulg"), ("neutral", "tabo lumi"), ("positive", "hyxa qylo")):
            answer = client.post("/predict", json={"text": text}).json()
            assert (answer["label"], answer["model_version"]) == (label, made.version)


def check_registry(stack: Stack, version: str) -> None:
    import mlflow

    settings = load_settings(overtone_home=stack.home, mlflow_tracking_uri=None)
    registry = Registry(settings)
    champion = registry.resolve("champion")
    assert (champion.bundle_version, champion.tags["gate"]) == (version, "promoted")
    assert registry.find("challenger") is None
    run = mlflow.MlflowClient(tracking_uri(settings)).get_run(champion.run_id)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert {"bundle_macro_recall", "macro_recall", "loss"} <= set(run.data.metrics)


def check_rollback(stack: Stack) -> None:
    """The champion before is served by every replica when the command returns."""
    began = time.monotonic()
    stack.overtone("models", "rollback")
    took = time.monotonic() - began
    with stack.client() as client:
        answer = client.post("/predict", json={"text": "hyxa fyru wyze"}).json()
    assert answer["model_version"] == load_bundle().version
    print(f"models rollback: {took:.1f} s")  # noqa: T201  (shown with -rP)


def check_retrain(stack: Stack) -> None:
    """Two checks at once order one job of a real job server, and the next one learns how it ended."""
    with stack.client() as client:
        for number, label in enumerate(WORDS):
            body = {"text": f"tabo {number}", "label": label}
            assert client.post("/feedback", json=body).status_code in {200, 201}
    # A file that is not there ends the run at once.
    command = [str(BIN / "python"), "-m", "overtone.cli", "retrain", "--check", "--json"]
    options = ["--", "--config", "nowhere.yaml", "--validation", "nowhere.tsv"]
    both: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: both.append(stack.run([*command, *options]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.returncode for one in both] == [0, 0], [one.stderr for one in both]
    found = sorted((json.loads(one.stdout) for one in both), key=lambda one: one["outcome"] != "submits")
    # The second may come so late that the run has failed already, and wait for that reason.
    assert [one["outcome"] == "submits" for one in found] == [True, False]
    run = found[0]["run"]
    headers = {"Authorization": f"Bearer {(stack.home / 'ray_token').read_text().strip()}"}

    def jobs() -> list[Any]:
        address = stack.ray["RAY_ADDRESS"]
        listed = httpx.get(f"{address}/api/jobs/", headers=headers, trust_env=False, timeout=30).json()
        return [one for one in listed if (one["submission_id"] or "").startswith("retrain-")]

    wait_until(lambda: jobs()[0]["status"] == "FAILED", 60, "the run to fail")
    assert [one["submission_id"] for one in jobs()] == [run]
    assert "--from-feedback" in jobs()[0]["entrypoint"]
    stack.overtone("retrain", "--check", "--every", "1s", *options)
    waits = "SELECT outcome, detail ->> 'reasons' FROM overtone.retrain_decisions WHERE run IS NULL"
    wait_until(lambda: len(stack.rows(waits)) >= 2, 60, "the actor to check twice")
    assert all("the last 1 runs failed" in reasons for _, reasons in stack.rows(waits))
    assert json.loads(stack.overtone("retrain", "--stop", "--json")) == {"stopped": True}
    assert stack.rows("SELECT run, state FROM overtone.retrain_decisions WHERE run IS NOT NULL") == [(run, "failed")]


@pytest.mark.usefixtures("mlflow_as_before")
def test_a_job_trains_wins_and_is_served(stack: Stack, tmp_path: Path, make_moods: Any) -> None:
    make_moods(tmp_path, 600, WORDS)
    check_training(stack, tmp_path)
    check_rollback(stack)
    check_retrain(stack)
