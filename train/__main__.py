"""`python -m train`: labelled texts in, a bundle out."""

import platform
import shlex
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from overtone.errors import ConfigurationError
from overtone.logging import configure
from overtone.settings import Settings, load_settings
from train.config import TrainConfig, load_config
from train.data import Split, build_split, read_labelled
from train.exits import as_exit_code
from train.feedback import read_feedback, require_not_erased
from train.remote import is_remote
from train.sources import Finding, read_rows, report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from train.evaluation import Evaluation
    from train.runs import Runs
    from train.tracking import Tracker

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(  # noqa: PLR0913, PLR0917 - flags of the command line
    config: Annotated[Path, typer.Option(help="Training file, such as configs/train/tweets.yaml.")],
    validation: Annotated[Path, typer.Option(help="Validation texts, in the same form.")],
    train: Annotated[
        Path | None,
        typer.Option(
            help="Training texts, .tsv, .csv, .jsonl or .parquet: a file, folder or address. Columns label and text."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the bundle; a bundle in it is replaced. Default: the registry alone has it."),
    ] = None,
    from_feedback: Annotated[
        bool, typer.Option("--from-feedback", help="Train on the feedback in the database, beside --train if given.")
    ] = False,
    assign: Annotated[list[str] | None, typer.Option("--set", help="Override a value: section.name=value.")] = None,
    run_name: Annotated[
        str | None, typer.Option(help="Name of the run; the name of an unfinished run resumes it. Default: a new one.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or address of checkpoints. Default: OVERTONE_HOME/runs.")
    ] = None,
    keep_runs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the runs that have ended, remove the checkpoints of all but so many. Default: none go."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same as --set optimiser.seed=N.")] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to train on. Default: one of this process's own."),
    ] = None,
    register: Annotated[bool, typer.Option(help="Register the bundle as challenger.")] = False,
    gate: Annotated[
        Path | None,
        typer.Option(help="Register the bundle, and promote it if it beats the champion on these texts, kept apart."),
    ] = None,
) -> None:
    """Fine-tune an encoder on Ray Train and export it as a bundle: fused, int8, calibrated, checked."""
    with as_exit_code(ConfigurationError) as console:
        if train is None and not from_feedback:
            raise ConfigurationError("say what to train on: --train, --from-feedback or both")
        registers = register or gate is not None
        if output is None and not registers:
            raise ConfigurationError("say where the bundle goes: --output, --register or --gate")
        settings = load_settings()
        configure("train", settings.log_level, settings.log_format)
        assignments = [*(assign or []), *([f"optimiser.seed={seed}"] if seed is not None else [])]
        chosen = load_config(config, settings, assignments)
        if gate:
            # What is wrong with them is told before hours of training, not after.
            read_labelled(gate, chosen.data.labels)
        name = run_name or f"{chosen.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        where = storage or str(settings.home / "runs")
        where = where if "://" in where else str(Path(where).expanduser().absolute())
        job = _Job(chosen, settings, console, (train, validation, output), with_feedback=from_feedback)
        job.run(name, where, address, registers=registers, keep_runs=keep_runs)
        if gate:
            from train.gate import CHALLENGER, CHAMPION, decide_and_promote, load_rules, show_decision

            decision = decide_and_promote(settings, CHALLENGER, CHAMPION, gate, load_rules(None))
            show_decision(console, decision)


class _Job:
    """One call of the command."""

    def __init__(
        self,
        config: TrainConfig,
        settings: Settings,
        console: Console,
        paths: tuple[Path | None, Path, Path | None],
        *,
        with_feedback: bool,
    ) -> None:
        self.config, self.settings, self.console = config, settings, console
        self.train, self.validation, self.output = paths
        self.with_feedback = with_feedback

    def run(self, name: str, storage: str, address: str | None, *, registers: bool, keep_runs: int | None) -> None:
        # Data and folders are checked before the libraries that take seconds to import.
        with self._cluster_for_data(address):
            split = self._read()
        try:
            from train.cluster import ray_cluster
            from train.export import require_bundle_folder
            from train.job import RunSpec, run_training
            from train.runs import Runs
        except ImportError as error:
            raise ConfigurationError(f"{error.name} is not installed; pip install 'overtone[train]'") from None
        from train.progress import RunProgress
        from train.tracking import ablation, tracked_run

        if self.output:
            require_bundle_folder(self.output)
        runs = Runs(storage)
        runs.begin(name)
        steps = ablation(self.settings, self.config.card.ablation)
        with (
            tracked_run(self.settings, self.config, name) as tracker,
            tempfile.TemporaryDirectory(prefix="overtone-") as scratch,
        ):
            weights, output = Path(scratch) / "weights", self.output or Path(scratch) / "bundle"
            learned, soft_labels = self._lessons(split)
            with ray_cluster(address), RunProgress(self.console) as progress:
                self.console.print(f"run {name}, checkpoints in {storage}")

                def follow(metrics: dict[str, Any]) -> None:
                    progress.report(metrics)
                    tracker.metrics(metrics, metrics["step"])

                spec = RunSpec(name, learned, storage, soft_labels)
                best = run_training(self.config, spec, follow, weights)
            found = self._publish(weights, output, split, best, steps)
            self._record(tracker, output, found, split, best["step"], registers=registers)
        self._tidy(runs, name, found.model_version, keep_runs)

    def _tidy(self, runs: "Runs", name: str, version: str, keep: int | None) -> None:
        try:
            runs.end(name, version)
            removed = runs.prune(keep) if keep else []
        except OSError as error:
            # All is done by now: the next run tries again.
            self.console.print(f"checkpoints of earlier runs could not be removed: {error}", style="yellow")
            return
        for old in removed:
            self.console.print(f"removed the checkpoints of run {old}", highlight=False)

    def _cluster_for_data(self, address: str | None) -> AbstractContextManager[None]:
        """The cluster that reads what is not one local file, if anything is."""
        if not any(is_remote(path) for path in (self.train, self.validation) if path):
            return nullcontext()
        from train.cluster import ray_cluster

        return ray_cluster(address)

    def _read(self) -> Split:
        from train.snapshot import write_snapshot

        names = self.config.data.labels
        training = [read_rows(self.train, names)] if self.train else []
        validation = read_rows(self.validation, names)
        unusable: tuple[Finding, ...] = ()
        if self.with_feedback:
            feedback, unusable = read_feedback(self.settings, names)
            training.append(feedback)
        split = build_split(training, validation, names, leaks=self.config.data.leaks)
        split = replace(split, dropped=(*unusable, *split.dropped))
        self.console.print(f"{len(split.train)} training texts, {len(split.validation)} validation texts")
        if split.dropped:
            self.console.print(
                f"left out of training:\n{report(split.dropped)}", highlight=False, markup=False, soft_wrap=True
            )
        place = write_snapshot(self.settings.home / "snapshots", split, [*training, validation], names)
        if self.with_feedback:
            require_not_erased(self.settings, split.rows[0], place)
        self.console.print(f"snapshot {place}", highlight=False, soft_wrap=True)
        return split

    def _record(
        self, tracker: "Tracker", output: Path, found: "Evaluation", split: Split, step: int, *, registers: bool
    ) -> None:
        from train.report import write_report

        figures = {
            "macro_recall": found.scores.macro_recall,
            "macro_f1": found.scores.macro_f1,
            "ece": found.scores.ece,
        }
        tracker.metrics({f"bundle_{name}": value for name, value in figures.items()}, step)
        hashes = {"train": split.train.sha256, "validation": split.validation.sha256, "snapshot": split.snapshot}
        tracker.tags({f"{name}_sha256": digest for name, digest in hashes.items()})
        with tempfile.TemporaryDirectory(prefix="overtone-") as folder:
            write_report(Path(folder), found)
            tracker.files(Path(folder), "report")
        registered = tracker.bundle(output, as_challenger=registers)
        if registered:
            self.console.print(f"registered as version {registered.version}, the challenger", highlight=False)

    def _lessons(self, split: Split) -> "tuple[Split, NDArray[np.float32] | None]":
        if not self.config.distillation.teachers:
            return split, None
        from train.distil import lessons
        from train.progress import counted

        with counted(self.console, "reading the training texts with the teachers") as progress:
            texts, soft = lessons(self.config, split.train, progress)
        return replace(split, train=texts), soft

    def _publish(
        self, weights: Path, output: Path, split: Split, best: dict[str, Any], steps: list[dict[str, Any]]
    ) -> "Evaluation":
        from train.publish import publish

        self.console.print(f"exporting the checkpoint of step {best['step']}")
        training = {
            "seconds": round(best["seconds"]),
            "step": best["step"],
            "device": f"{best['device']} ({platform.machine()})",
            **({"ablation": steps} if steps else {}),
        }
        shown = "python -m train " + shlex.join(sys.argv[1:])
        found = publish(weights, output, self.config, split, training, shown, self.console)
        if self.output:
            self.console.print(f"bundle written to {output}")
        return found


if __name__ == "__main__":
    app()
