"""Which runs of a storage have ended, and which of them go."""

import os
from pathlib import Path

import pytest

from overtone.errors import ConfigurationError
from train.runs import Runs


def ended(runs: Runs, storage: Path, name: str, at: int) -> None:
    """A run with a checkpoint that ended at the second `at`."""
    weights = storage / name / "checkpoint_1" / "weights"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"weights")
    runs.end(name, f"bundle-of-{name}")
    os.utime(storage / name / "ended.txt", (at, at))


def left(storage: Path) -> set[str]:
    return {path.name for path in storage.iterdir()}


def test_of_the_runs_that_ended_the_last_stay(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path))
    for at, name in enumerate(("b", "a", "d", "c"), start=1):
        ended(runs, tmp_path, name, at)
    (tmp_path / "unfinished" / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert runs.prune(2) == ["a", "b"]
    assert left(tmp_path) == {"c", "d", "unfinished", "notes.txt"}
    assert (tmp_path / "c" / "ended.txt").read_text() == "bundle-of-c\n"
    assert runs.prune(2) == []


def test_a_run_that_is_taken_up_again_has_not_ended(tmp_path: Path) -> None:
    runs = Runs(tmp_path.as_uri())
    runs.begin("new")
    ended(runs, tmp_path, "old", 1)
    runs.begin("old")
    ended(runs, tmp_path, "new", 2)
    assert runs.prune(1) == []
    assert left(tmp_path) == {"old", "new"}


def test_a_storage_that_is_not_there_yet_has_no_runs(tmp_path: Path) -> None:
    assert Runs(str(tmp_path / "runs")).prune(1) == []


def test_no_such_storage() -> None:
    with pytest.raises(ConfigurationError, match="--storage nowhere://runs: "):
        Runs("nowhere://runs")
