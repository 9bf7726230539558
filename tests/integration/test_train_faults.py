"""What becomes of a training run when its processes are killed, and when it is repeated."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from overtone.bundle import Bundle, load_bundle
from overtone.settings import environment_for, load_settings

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
STEPS = 150  # 3 epochs of 800 texts in batches of 16


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_moods: Callable[[Path, int], None]) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_moods(folder, 800)
    config = {
        "name": "moods",
        "model": {"name": str(folder / "encoder"), "max_length": 32, "precision": "fp32", "pooling": "mean"},
        "optimiser": {"epochs": 3, "batch_size": 16, "learning_rate": 5e-3, "evaluations": 1},
        "export": {"max_int8_loss": 0.05},
    }
    (folder / "moods.yaml").write_text(yaml.safe_dump(config))
    return folder


class Running:
    """A training run in a process of its own, its output in a file."""

    def __init__(self, workshop: Path, run: str, *extra: str) -> None:
        self.output = workshop / f"bundle-{run}"
        self.log = workshop / f"{run}.log"
        self.checkpoints = workshop / "runs" / run
        arguments = {
            "--config": workshop / "moods.yaml",
            "--train": workshop / "train.tsv",
            "--validation": workshop / "validation.tsv",
            "--output": self.output,
            "--storage": workshop / "runs",
            "--run-name": run,
        }
        home = str(workshop / "home")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train", *(str(part) for pair in arguments.items() for part in pair), *extra],
                cwd=ROOT,
                env=environment_for(load_settings(), OVERTONE_HOME=home, HOME=home, LOG_FORMAT="json", COLUMNS="200"),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def workers(self) -> list[psutil.Process]:
        """The processes that train, once they do."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def wait_for_checkpoint(self, seconds: float = 240) -> None:
        """Return once an epoch has been trained and kept."""
        end = time.monotonic() + seconds
        while not (self.checkpoints / "checkpoint_manager_snapshot.json").exists():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def finish(self) -> str:
        """Wait for the end and return what was printed."""
        code = self.process.wait(timeout=400)
        printed = self.log.read_text()
        assert code == 0, printed[-3000:]
        return printed


@contextlib.contextmanager
def run(workshop: Path, name: str, *extra: str) -> Iterator[Running]:
    running = Running(workshop, name, *extra)
    try:
        yield running
    finally:
        left = [running.process] if running.process.poll() is None else []
        for process in left:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.kill()
            process.wait()


def last_step(printed: str) -> int:
    return max(int(found) for found in re.findall(r"step (\d+)/", printed))


@pytest.mark.parametrize(
    "cluster", [{"workers": 2}, {"workers": 1, "max_workers": 2}, {"workers": 2, "sharding": "shard"}]
)
def test_one_of_two_workers_killed(workshop: Path, cluster: dict[str, Any]) -> None:
    name = "-".join(map(str, ("killed", *cluster.values())))
    values = {"cpus_per_worker": 1, **cluster}
    with run(
        workshop, name, *(part for key, value in values.items() for part in ("--set", f"cluster.{key}={value}"))
    ) as running:
        running.wait_for_checkpoint()
        victims = running.workers()
        assert len(victims) == 2
        os.kill(victims[0].pid, signal.SIGKILL)
        printed = running.finish()

    assert last_step(printed) == STEPS
    bundle = load_bundle(running.output)
    assert bundle.metrics["validation"]["macro_recall"] > 0.9
    if "max_workers" not in cluster:
        # As many workers as before take the same shares of the same batches: not a close figure but the same weights.
        assert bundle.sha256 == unbroken(workshop, values).sha256


def unbroken(workshop: Path, values: dict[str, Any]) -> Bundle:
    """The bundle of a run of the same `values` of which nothing is killed."""
    name = "-".join(map(str, ("unbroken", *values.values())))
    with run(
        workshop, name, *(part for key, value in values.items() for part in ("--set", f"cluster.{key}={value}"))
    ) as running:
        assert last_step(running.finish()) == STEPS
    return load_bundle(running.output)


@pytest.fixture(scope="module")
def resumed(workshop: Path) -> tuple[Bundle, str]:
    """The bundle of a run whose command was killed and given again, and what the second one printed."""
    arguments = ("resumed", "--seed", "5")
    with run(workshop, *arguments) as first:
        first.wait_for_checkpoint()
        for process in (psutil.Process(first.process.pid), *psutil.Process(first.process.pid).children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                process.kill()
        first.process.wait()

    with run(workshop, *arguments) as second:
        printed = second.finish()
    return load_bundle(second.output), printed


def test_a_killed_command_resumes_by_the_name_of_its_run(resumed: tuple[Bundle, str]) -> None:
    steps = [int(found) for found in re.findall(r"step (\d+)/", resumed[1])]
    assert min(steps) > STEPS // 3, "the first epoch was trained again"
    assert max(steps) == STEPS


def test_the_same_seed_gives_the_same_bundle_even_if_one_run_was_killed(
    workshop: Path, resumed: tuple[Bundle, str]
) -> None:
    with run(workshop, "unbroken", "--seed", "5") as running:
        running.finish()

    bundle = load_bundle(running.output)
    assert bundle.sha256 == resumed[0].sha256
    assert bundle.version == resumed[0].version
