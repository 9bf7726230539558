"""`python -m benchmarks.training`: what Ray Train costs, what a second worker brings, what grouping by length saves.

Every figure is a ratio of training speeds, texts/s, of runs made one after the other on this machine: the same loop,
encoder and texts, without exports. Start-up and the first stretch of steps are left out. Runs are on a GPU where there
is one, two workers where there are two. Grouping needs no Ray.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.command import require_parts, run
from benchmarks.results import RESULTS, Result, ratio, write
from benchmarks.texts import synthetic_texts
from overtone.schema import LABELS
from train.config import TrainConfig, load_config
from train.data import Split, read_split

OUTPUT = RESULTS.with_name("training.json")
PARTS = {
    "ray": ("train.ray_ratio", "ray", "grouped"),
    "workers": ("train.two_workers_ratio", "two workers", "ray"),
    "grouping": ("train.grouping_ratio", "grouped", "random"),
}
"""Of each part the figure, and the kinds of run whose speeds it divides."""
AIMS = {
    "train.ray_ratio": "at least 0.95",
    "train.two_workers_ratio": "at least 0.9",
    "train.grouping_ratio": "at least 1.5 on a GPU",
}
_FILE = Path(__file__).parents[1] / "configs" / "train" / "tweets.yaml"
_console = Console(stderr=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure only this, may be repeated: {', '.join(PARTS)}.")
    ] = None,
    steps: Annotated[int, typer.Option(min=150, help="Steps a run; the first 50 are not counted.")] = 250,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each kind.")] = 3,
    assign: Annotated[list[str] | None, typer.Option("--set", help="Override a value: section.name=value.")] = None,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = OUTPUT,
    bare: Annotated[
        Path | None, typer.Option(hidden=True, help="Train in this process on the data in a folder.")
    ] = None,
) -> None:
    """Measure and write the results."""
    config = _config(steps, assign or [])
    if bare is not None:
        sys.stdout.write(json.dumps(_train_alone(config, bare)) + "\n")
        return
    require_parts(only, tuple(PARTS))
    ratios = [PARTS[part] for part in dict.fromkeys(only or PARTS)]
    speeds: dict[str, list[float]] = {kind: [] for _, *kinds in ratios for kind in kinds}
    details: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="overtone-") as scratch, _console.status("starting") as status:
        folder = Path(scratch)
        _write_data(folder, steps * config.optimiser.batch_size)
        for number in range(rounds):
            for kind, seen in speeds.items():
                status.update(f"round {number + 1} of {rounds}: {kind}")
                measured = _measure(kind, folder, steps, assign or [], f"{kind}-{number}".replace(" ", "-"))
                seen.append(measured.pop("texts_per_s"))
                details[kind] = measured
    results = {
        name: ratio(speeds[kind], speeds[other], texts_per_s=_middle(speeds[kind]), **details[kind])
        for name, kind, other in ratios
    }
    write(results, output, model_version="none", quick=False)
    _show(results)


def _config(steps: int, assignments: Sequence[str]) -> TrainConfig:
    from overtone.settings import load_settings

    return load_config(
        _FILE, load_settings(), [f"optimiser.max_steps={steps}", "optimiser.evaluations=1", *assignments]
    )


def _write_data(folder: Path, number: int) -> None:
    texts = [" ".join(text.split()) for text in synthetic_texts(number + 32)]
    for name, chosen in (("train", texts[32:]), ("validation", texts[:32])):
        lines = [f"{LABELS[row % len(LABELS)]}\t{text}" for row, text in enumerate(chosen)]
        (folder / f"{name}.tsv").write_text("label\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")


class _Speed:
    """Texts a second of a run, the first stretch left out, and what it said of the device at last."""

    def __init__(self) -> None:
        self._seen: list[float] = []
        self._last: dict[str, Any] = {}

    def report(self, metrics: dict[str, Any], _folder: Path | None = None) -> None:
        if "macro_recall" not in metrics:
            self._seen.append(metrics["texts_per_s"])
            self._last = metrics

    def value(self) -> dict[str, Any]:
        kept = ("device", "tokens_per_s", "gpu_utilisation", "gpu_memory_mib")
        found = {name: self._last[name] for name in kept if name in self._last}
        return {"texts_per_s": statistics.harmonic_mean(self._seen[1:]), **found}


def _measure(kind: str, folder: Path, steps: int, assignments: Sequence[str], name: str) -> dict[str, Any]:
    own = {"two workers": ["cluster.workers=2"], "random": ["data.group_batches=1"]}.get(kind, [])
    chosen = [*assignments, *own]
    if kind in {"grouped", "random"}:
        sets = [part for assignment in chosen for part in ("--set", assignment)]
        command = [sys.executable, "-m", "benchmarks.training", "--bare", str(folder), "--steps", str(steps), *sets]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        measured: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return measured
    from train.cluster import ray_cluster
    from train.job import RunSpec, run_training

    config = _config(steps, chosen)
    spec = RunSpec(name, _split(folder, config), str(folder / "runs"))
    speed = _Speed()
    with ray_cluster(None):
        run_training(config, spec, speed.report, folder / f"weights-{name}")
    return speed.value()


def _train_alone(config: TrainConfig, folder: Path) -> dict[str, Any]:
    from train.loop import Run, alone
    from train.optimiser import usable_device

    speed = _Speed()
    Run(config, _split(folder, config), None, replace(alone(speed.report), device=usable_device())).train()
    return speed.value()


def _split(folder: Path, config: TrainConfig) -> Split:
    return read_split(folder / "train.tsv", folder / "validation.tsv", config.data.labels, leaks="drop")


def _middle(speeds: list[float]) -> float:
    return round(statistics.median(speeds), 1)


def _show(results: dict[str, Result]) -> None:
    table = Table("measured", "value", "aim", "texts/s", "tokens/s", "GPU in use", box=None)
    for name, result in results.items():
        detail = result.detail
        used = f"{detail['gpu_utilisation']:.0%}" if "gpu_utilisation" in detail else ""
        speeds = (f"{detail[unit]:,.0f}" for unit in ("texts_per_s", "tokens_per_s"))
        table.add_row(name, f"{result.value:.2f}", AIMS[name], *speeds, used)
    _console.print(table)


if __name__ == "__main__":
    run(main)
