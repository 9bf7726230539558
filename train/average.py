"""`python -m train.average`: one bundle from the averaged weights of several checkpoints.

Runs that start from the same encoder and head and differ in order, length or rates end close enough together for the
mean of their weights to be a better model than each of them, at the cost of one ("model soup").
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from overtone.errors import DataError
from overtone.logging import configure
from overtone.settings import load_settings
from train.config import load_config
from train.data import read_split
from train.exits import as_exit_code
from train.publish import publish
from train.tracking import ablation

_FILE = "model.safetensors"


def average_weights(folders: Sequence[Path], target: Path) -> None:
    """Write into the new folder `target` the model of the first folder with the mean of the weights of all.

    Raises:
        DataError: a folder holds no weights, or those of another architecture.
    """
    import torch
    from safetensors.torch import load_file, save_file

    for folder in folders:
        if not (folder / _FILE).is_file():
            raise DataError(f"{folder}: holds no {_FILE}; name the folder `weights` of a checkpoint")
    sets = [load_file(folder / _FILE) for folder in folders]
    for folder, one in zip(folders, sets, strict=True):
        if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in sets[0].items()}:
            raise DataError(f"{folder}: its weights are not of the same architecture as those in {folders[0]}")
    shutil.copytree(folders[0], target)
    mean = {}
    for name, first in sets[0].items():
        average = torch.stack([one[name].double() for one in sets]).mean(dim=0).to(first.dtype)
        mean[name] = average if first.is_floating_point() else first
    save_file(mean, target / _FILE, metadata={"format": "pt"})


def command(
    weights: Annotated[list[Path], typer.Argument(help="Folders `weights` of checkpoints, one or more.")],
    config: Annotated[Path, typer.Option(help="Training file of the runs.")],
    train: Annotated[Path, typer.Option(help="Training texts of the runs.")],
    validation: Annotated[Path, typer.Option(help="Validation texts.")],
    output: Annotated[Path, typer.Option(help="Folder for the bundle; a bundle in it is replaced.")],
    assign: Annotated[list[str] | None, typer.Option("--set", help="Override a value: section.name=value.")] = None,
) -> None:
    """Average the weights of checkpoints and export the result as a bundle."""
    with as_exit_code() as console:
        settings = load_settings()
        configure("train", settings.log_level, settings.log_format)
        chosen = load_config(config, settings, assign or [])
        split = read_split(train, validation, chosen.data.labels, leaks=chosen.data.leaks)
        with tempfile.TemporaryDirectory(prefix="overtone-") as scratch:
            mean = Path(scratch) / "weights"
            average_weights(weights, mean)
            steps = ablation(settings, chosen.card.ablation)
            facts = {"averaged_checkpoints": len(weights), **({"ablation": steps} if steps else {})}
            shown = "python -m train.average " + shlex.join(sys.argv[1:])
            publish(mean, output, chosen, split, facts, shown, console)
            console.print(f"bundle written to {output}")


if __name__ == "__main__":
    typer.run(command)
