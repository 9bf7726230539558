"""`python -m train.evaluate --bundle B --data D.tsv`: score a bundle, through the engine that serves it."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from overtone.bundle import Bundle, load_bundle
from overtone.errors import OvertoneError
from overtone.logging import configure
from overtone.settings import load_settings
from train.data import read_labelled
from train.evaluation import Evaluation, measure
from train.exits import as_exit_code
from train.scores import Scores

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def evaluate(
    bundle: Bundle, data: Path, *, with_robustness: bool = True, baselines_from: Path | None = None
) -> Evaluation:
    """What is measured of `bundle` on the labelled texts of the file `data`; see `train.evaluation`.

    Baselines are measured too where `baselines_from` names a file of texts to train one on.

    Raises:
        DataError: a file cannot be used.
        EnvironmentProblemError: a library of the baselines is missing.
    """
    texts = read_labelled(data, bundle.labels)
    training = read_labelled(baselines_from, bundle.labels) if baselines_from else None
    found = measure(bundle, texts, with_robustness=with_robustness)
    if training is None:
        return found
    from train.baselines import baseline_scores

    return replace(found, baselines=baseline_scores(training, texts, bundle.labels))


def show(console: Console, scores: Scores, title: str) -> None:
    """Print `scores` as tables."""
    console.print(
        f"[bold]{title}[/bold]: macro-averaged recall {scores.macro_recall:.4f}, macro F1 {scores.macro_f1:.4f}, "
        f"accuracy {scores.accuracy:.4f}, calibration error {scores.ece:.4f}, {scores.rows} texts"
    )
    table = Table("label", "precision", "recall", "F1", "texts", *(f"as {name}" for name in scores.per_label))
    for (name, one), row in zip(scores.per_label.items(), scores.confusion, strict=True):
        figures = (f"{value:.3f}" for value in (one.precision, one.recall, one.f1))
        table.add_row(name, *figures, str(one.support), *map(str, row))
    console.print(table)


def show_evaluation(console: Console, found: Evaluation) -> None:
    """Print everything in `found` as tables."""
    show(console, found.scores, found.model_version)
    recall = found.intervals["macro_recall"]
    console.print(
        f"95 % of macro-averaged recall: {recall.low:.4f} to {recall.high:.4f}; calibration error before the "
        f"temperature of {found.temperature:g}: {found.ece_before_calibration:.4f}"
    )
    console.print(
        f"{found.speed.texts_per_s:.0f} texts/s, {found.speed.tokens_per_s:.0f} tokens/s on {found.speed.threads} "
        f"threads; model {found.size.model_bytes / 1e6:.1f} MB"
    )
    kinds = Table("slice", "texts", "macro recall", "95 %", "accuracy")
    for name, one in found.slices.items():
        recall = one.macro_recall
        bounds = f"{recall.low:.3f} to {recall.high:.3f}"
        kinds.add_row(name, str(one.rows), f"{recall.value:.3f}", bounds, f"{one.accuracy.value:.3f}")
    console.print(kinds)
    if found.robustness:
        changes = Table("texts changed by", "macro recall", "change", "same label")
        for name, held in found.robustness.items():
            changes.add_row(name, f"{held.macro_recall:.3f}", f"{held.change:+.3f}", f"{held.same_label:.1%}")
        console.print(changes)
    if found.baselines:
        others = Table("baseline", "macro recall", "macro F1", "accuracy")
        for name, scores in found.baselines.items():
            others.add_row(name, *(f"{one:.3f}" for one in (scores.macro_recall, scores.macro_f1, scores.accuracy)))
        console.print(others)


@app.command()
def command(
    data: Annotated[Path, typer.Option(help="Tab-separated file with the columns label and text.")],
    bundle: Annotated[Path | None, typer.Option(help="Folder of the bundle. Default: the one in the package.")] = None,
    baselines: Annotated[
        Path | None, typer.Option(help="Training texts: measure VADER and a linear model trained on them too.")
    ] = None,
    robustness: Annotated[
        bool, typer.Option(help="Classify the texts changed in six ways too, which takes six times as long.")
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Folder for a report in HTML with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Score a bundle on labelled texts: recall, F1, accuracy, calibration, slices, robustness, speed and size."""
    with as_exit_code(OvertoneError):
        settings = load_settings()
        configure("train", settings.log_level, settings.log_format)
        opened = load_bundle(bundle)
        found = evaluate(opened, data, with_robustness=robustness, baselines_from=baselines)
        if report:
            from train.report import write_report

            write_report(report, found)
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(found.as_dict()) + b"\n")
    else:
        show_evaluation(Console(), found)
        if report:
            Console().print(f"report in {report / 'index.html'}", highlight=False)


if __name__ == "__main__":
    app()
