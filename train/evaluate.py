"""`python -m train.evaluate --bundle B --data D.tsv`: score a bundle, through the engine that serves it."""

import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from overtone.bundle import Bundle, load_bundle, probabilities
from overtone.errors import OvertoneError
from train.data import read_labelled
from train.export import log_scores
from train.scores import Scores, score


def evaluate(bundle: Bundle, data: Path) -> Scores:
    """Scores of `bundle` on the labelled texts of the file `data`.

    Raises:
        DataError: the file cannot be used.
    """
    texts = read_labelled(data, bundle.labels)
    # The engine's log scores are calibrated already.
    return score(probabilities(log_scores(bundle, texts.texts), 1.0), texts.labels, bundle.labels)


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


def command(
    data: Annotated[Path, typer.Option(help="Tab-separated file with the columns label and text.")],
    bundle: Annotated[Path | None, typer.Option(help="Folder of the bundle. Default: the one in the package.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Score a bundle on labelled texts: macro-averaged recall, F1, accuracy, calibration, confusion."""
    try:
        opened = load_bundle(bundle)
        scores = evaluate(opened, data)
    except OvertoneError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error.message}", highlight=False)
        raise typer.Exit(2) from None
    if as_json:
        sys.stdout.buffer.write(orjson.dumps({"model_version": opened.version, **scores.as_dict()}) + b"\n")
    else:
        show(Console(), scores, opened.version)


if __name__ == "__main__":
    typer.run(command)
