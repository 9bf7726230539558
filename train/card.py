"""The model card of a bundle: Markdown written from the manifest, so that every figure in it was measured."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from overtone.bundle import Bundle
from train.config import TrainConfig
from train.evaluation import Evaluation
from train.export import Exported

_PRODUCTS = {"bf16": "bf16 where the processor multiplies it", "fp32": "fp32"}


def render(exported: Exported, found: Evaluation, config: TrainConfig, command: str) -> str:
    """The card of `exported`, trained by `command` (shown as it is); `found` is of the validation texts."""
    bundle = exported.bundle
    parts = [
        f"# {bundle.name}",
        _summary(bundle, config),
        "## Training data\n\n" + config.card.data.strip() + "\n\n" + _data_table(bundle.metrics.get("data", {})),
        "## Results on the validation texts\n\n" + _results(exported, found),
        "### By kind of text\n\n" + _slices(found),
        "### Under changes that leave the meaning\n\n" + _robustness(found),
        "## Calibration\n\n" + _calibration(exported),
        *_ablation(bundle.metrics.get("training", {}), config),
        "## Training\n\n" + _training(bundle.metrics.get("training", {}), config, command),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*config.card.limits, *_common_limits(bundle))),
        "## Licence\n\n" + f"Weights: {bundle.license}, from the base encoder {bundle.base_model}.",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(bundle: Bundle, config: TrainConfig) -> str:
    labels = ", ".join(bundle.labels)
    device = " on CPU" if bundle.precision == "int8" else ""
    return (
        f"Version `{bundle.version}`. Classifies a text as one of: {labels}. Fine-tuned from {bundle.base_model}; "
        f"{bundle.precision} weights for ONNX Runtime{device}; texts are cut at {config.model.max_length} tokens."
    )


def _data_table(data: Mapping[str, Any]) -> str:
    rows = [
        [split, str(sum(counts.values())), *(str(count) for count in counts.values())]
        for split in ("train", "validation")
        if (counts := data.get(split))
    ]
    if not rows:
        return ""
    table = _table(["split", "texts", *data["validation"]], rows)
    dropped = "; ".join(f"{reason}: {count}" for reason, count in data.get("dropped", {}).items()) or "nothing"
    return table + f"\n\nLeft out of training: {dropped}. Content hash of the data: `{data.get('snapshot', '')}`."


def _results(exported: Exported, found: Evaluation) -> str:
    scores, reference = exported.scores, exported.reference
    overall = _table(
        ["model", "macro-averaged recall", "macro F1", "accuracy"],
        [
            [
                f"this bundle ({exported.bundle.precision})",
                *_figures(scores.macro_recall, scores.macro_f1, scores.accuracy),
            ],
            ["the same in fp32", *_figures(reference.macro_recall, reference.macro_f1, reference.accuracy)],
        ],
    )
    labels = _table(
        ["label", "precision", "recall", "F1", "texts"],
        [
            [name, *_figures(one.precision, one.recall, one.f1), str(one.support)]
            for name, one in scores.per_label.items()
        ],
    )
    confusion = _table(
        ["true label", *(f"predicted {name}" for name in scores.per_label)],
        [[name, *map(str, row)] for name, row in zip(scores.per_label, scores.confusion, strict=True)],
    )
    recall = found.intervals["macro_recall"]
    sure = f"95 % confidence interval of macro-averaged recall: {recall.low:.3f} to {recall.high:.3f}."
    return "\n\n".join([overall, sure, labels, confusion])


def _slices(found: Evaluation) -> str:
    rows = [
        [name.replace("_", " "), str(one.rows), *_figures(recall.value, recall.low, recall.high)]
        for name, one in found.slices.items()
        for recall in [one.macro_recall]
    ]
    return _table(["texts", "number", "macro-averaged recall", "95 % from", "to"], rows)


def _robustness(found: Evaluation) -> str:
    rows = [
        [name.replace("_", " "), *_figures(one.macro_recall), f"{one.change:+.3f}", f"{one.same_label:.1%}"]
        for name, one in found.robustness.items()
    ]
    return _table(["change", "macro-averaged recall", "against unchanged", "same label"], rows)


def _calibration(exported: Exported) -> str:
    before = exported.bundle.metrics["ece_before_calibration"]
    return (
        f"Temperature {exported.bundle.temperature}, fitted on the validation texts. Expected calibration error over "
        f"15 bins: {before:.3f} before, {exported.scores.ece:.3f} after, on the same texts, so the second is a little "
        "flattering."
    )


def _ablation(training: Mapping[str, Any], config: TrainConfig) -> list[str]:
    steps = training.get("ablation", [])
    if not steps:
        return []
    figures = [one["macro_recall"] for one in steps]
    changes = ["", *(f"{now - before:+.3f}" for before, now in pairwise(figures))]
    rows = [[one["step"], *_figures(one["macro_recall"]), change] for one, change in zip(steps, changes, strict=True)]
    table = _table(["step", "macro-averaged recall", "against the row above"], rows)
    return ["\n\n".join(["## What each step is worth", *filter(None, [config.card.ablation_note.strip()]), table])]


def _training(training: Mapping[str, Any], config: TrainConfig, command: str) -> str:
    optimiser = config.optimiser
    count = training.get("averaged_checkpoints", 1)
    lines = [f"- mean of the weights of {count} checkpoints"] if count > 1 else []
    lines += [
        f"- {optimiser.epochs} epochs, batch {optimiser.batch_size}, peak learning rate {optimiser.learning_rate:g}, "
        f"layer decay {optimiser.layer_decay:g}, {optimiser.schedule} schedule, {_PRODUCTS[config.model.precision]}",
        f"- logit adjustment tau {optimiser.prior_tau:g}, label smoothing {optimiser.label_smoothing:g}, "
        f"{f'R-Drop {optimiser.rdrop:g}, ' if optimiser.rdrop else ''}"
        f"{f'mixout {optimiser.mixout:g}, ' if optimiser.mixout else ''}seed {optimiser.seed}",
    ]
    taught = config.distillation
    if teachers := len(taught.teachers):
        copies = f", over the texts and {taught.copies} altered copies of each" if taught.copies else ""
        lines.append(f"- {taught.weight:.0%} of the loss against the mean probabilities of {teachers} teachers{copies}")
    if "seconds" in training:
        lines.append(f"- {training['seconds'] / 60:.0f} minutes on {training['device']}")
    return "\n".join(lines) + f"\n\n```\n{command}\n```"


def _common_limits(bundle: Bundle) -> list[str]:
    limits = [f"Only the first {bundle.max_length} tokens of a text are read."]
    if bundle.precision == "int8":
        limits.append(
            "The int8 weights use their full range: on x86 processors without VNNI (before 2019 or so), programs that "
            "run the file with ONNX Runtime's default options get sums that saturate. Set `session.x64quantprecision` "
            "to 1 there, as Overtone does."
        )
    return limits


def _figures(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
