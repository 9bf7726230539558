"""The end of a run: export the weights, write the model card, show the figures."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from train.config import TrainConfig
from train.data import LabelledTexts, Split
from train.evaluation import Evaluation, measure
from train.export import CARD_FILE, export_bundle


def publish(
    weights: Path,
    output: Path,
    config: TrainConfig,
    split: Split,
    training: Mapping[str, Any],
    command: str,
    console: Console,
) -> Evaluation:
    """Make `output` the bundle and card of the model in `weights`; `training` and `command` are recorded in them.

    Returns what was measured of the bundle on the validation texts.

    Raises:
        OvertoneError: see `export_bundle`.
    """
    from train.card import render
    from train.evaluate import show_evaluation

    facts = {
        "data": {
            "train": _counts(split.train, config),
            "validation": _counts(split.validation, config),
            "dropped": _dropped(split),
            "snapshot": split.snapshot,
            "train_sha256": split.train.sha256,
            "validation_sha256": split.validation.sha256,
        },
        "training": {
            **training,
            "config": config.model_dump(mode="json", include={"model", "data", "optimiser", "distillation", "export"}),
        },
    }
    exported = export_bundle(weights, output, config, split, facts)
    found = measure(exported.bundle, split.validation)
    (output / CARD_FILE).write_text(render(exported, found, config, command), encoding="utf-8")
    show_evaluation(console, found)
    return found


def _dropped(split: Split) -> dict[str, int]:
    rows: Counter[str] = Counter()
    for finding in split.dropped:
        rows[finding.reason] += len(finding.lines)
    return dict(rows)


def _counts(texts: LabelledTexts, config: TrainConfig) -> dict[str, int]:
    counts = np.bincount(texts.labels, minlength=len(config.data.labels))
    return dict(zip(config.data.labels, counts.tolist(), strict=True))
