"""`python -m benchmarks.training`: what Ray Train costs, what a second worker brings, what grouping by length saves.

Every figure is a ratio of training speeds, texts/s, of runs made one after the other on this machine: the same loop,
encoder and texts, without exports. Start-up and the first stretch of steps are left out.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.command import run
from benchmarks.results import RESULTS, Result, ratio, write
from benchmarks.texts import synthetic_texts
from overtone.schema import LABELS
from train.config import TrainConfig, load_config
from train.data import read_split

OUTPUT = RESULTS.with_name("training.json")
AIMS = {
    "train.ray_ratio": "at least 0.95",
    "train.two_workers_ratio": "at least 0.9",
    "train.grouping_ratio": "at least 1.5 on a GPU",
}
_FILE = Path(__file__).parents[1] / "configs" / "train" / "tweets.yaml"
_BATCH = 32
_console = Console(stderr=True)


def main(
    steps: Annotated[int, typer.Option(min=150, help="Steps a run; the first 50 are not counted.")] = 250,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each kind.")] = 3,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = OUTPUT,
    bare: Annotated[
        Path | None, typer.Option(hidden=True, help="Train in this process on the data in a folder.")
    ] = None,
) -> None:
    """Measure and write the results."""
    if bare is not None:
        sys.stdout.write(f"{_train_alone(bare, steps)}\n")
        return
    with tempfile.TemporaryDirectory(prefix="overtone-") as scratch, _console.status("starting") as status:
        folder = Path(scratch)
        _write_data(folder, steps)
        speeds: dict[str, list[float]] = {"bare": [], "ray": [], "two workers": [], "random batches": []}
        for number in range(rounds):
            for kind, seen in speeds.items():
                status.update(f"round {number + 1} of {rounds}: {kind}")
                seen.append(_measure(kind, folder, steps, f"{kind}-{number}".replace(" ", "-")))
    results = {
        "train.ray_ratio": ratio(speeds["ray"], speeds["bare"], texts_per_s=_middle(speeds["ray"])),
        "train.two_workers_ratio": ratio(
            speeds["two workers"], speeds["ray"], texts_per_s=_middle(speeds["two workers"])
        ),
        "train.grouping_ratio": ratio(speeds["ray"], speeds["random batches"], texts_per_s=_middle(speeds["ray"])),
    }
    write(results, output, model_version="none", quick=False)
    _show(results)


def _config(steps: int, **assigned: Any) -> TrainConfig:
    from overtone.settings import load_settings

    values = {"optimiser.max_steps": steps, "optimiser.evaluations": 1, "optimiser.batch_size": _BATCH, **assigned}
    return load_config(_FILE, load_settings(), [f"{name}={value}" for name, value in values.items()])


def _write_data(folder: Path, steps: int) -> None:
    texts = [" ".join(text.split()) for text in synthetic_texts(_BATCH * steps + 32)]
    for name, chosen in (("train", texts[32:]), ("validation", texts[:32])):
        lines = [f"{LABELS[number % len(LABELS)]}\t{text}" for number, text in enumerate(chosen)]
        (folder / f"{name}.tsv").write_text("label\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")


class _Speed:
    """Texts a second of a run, the first stretch left out."""

    def __init__(self) -> None:
        self._seen: list[float] = []

    def report(self, metrics: dict[str, Any], _folder: Path | None = None) -> None:
        if "macro_recall" not in metrics:
            self._seen.append(metrics["texts_per_s"])

    def value(self) -> float:
        return statistics.harmonic_mean(self._seen[1:])


def _measure(kind: str, folder: Path, steps: int, name: str) -> float:
    if kind == "bare":
        command = [sys.executable, "-m", "benchmarks.training", "--bare", str(folder), "--steps", str(steps)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return float(printed.splitlines()[-1])
    from train.cluster import ray_cluster
    from train.job import RunSpec, run_training

    assigned = {"two workers": {"cluster.workers": 2}, "random batches": {"data.group_batches": 1}}.get(kind, {})
    config = _config(steps, **assigned)
    split = read_split(folder / "train.tsv", folder / "validation.tsv", config.data.labels)
    spec = RunSpec(name, split, str(folder / "runs"))
    speed = _Speed()
    with ray_cluster(None):
        run_training(config, spec, speed.report, folder / f"weights-{name}")
    return speed.value()


def _train_alone(folder: Path, steps: int) -> float:
    from train.loop import Run, alone

    config = _config(steps)
    split = read_split(folder / "train.tsv", folder / "validation.tsv", config.data.labels)
    speed = _Speed()
    Run(config, split, None, alone(speed.report)).train()
    return speed.value()


def _middle(speeds: list[float]) -> float:
    return round(statistics.median(speeds), 1)


def _show(results: dict[str, Result]) -> None:
    table = Table("measured", "value", "aim", "texts/s", box=None)
    for name, result in results.items():
        table.add_row(name, f"{result.value:.2f}", AIMS[name], str(result.detail["texts_per_s"]))
    _console.print(table)


if __name__ == "__main__":
    run(main)
