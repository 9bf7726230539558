"""How good a set of predictions is: macro-averaged recall and its companions. Pure numpy.

Macro-averaged recall is the mean over labels of the share of that label's texts that were found. It is what TweetEval
ranks sentiment models by, because it does not reward a model for the mix of labels in a test set.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelScore:
    """How one label was found."""

    precision: float
    recall: float
    f1: float
    support: int
    """Texts that truly have the label."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The texts whose confidence lies in one of equal ranges."""

    confidence: float
    """Mean."""
    accuracy: float
    texts: int


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    macro_recall: float
    macro_f1: float
    accuracy: float
    ece: float
    """Expected calibration error: mean gap between confidence and accuracy over 15 equal bins, weighted by texts."""
    rows: int
    per_label: dict[str, LabelScore]
    confusion: list[list[int]]
    """Texts by true label (row) and predicted label (column)."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def score(probabilities: NDArray[np.float32], truth: NDArray[np.int64], names: Sequence[str]) -> Scores:
    """Compare `probabilities` [rows, labels] with the `truth` [rows]. A label without a row counts as recall 0."""
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    per_label = {name: _label_score(confusion, index) for index, name in enumerate(names)}
    return Scores(
        macro_recall=float(np.mean([one.recall for one in per_label.values()])),
        macro_f1=float(np.mean([one.f1 for one in per_label.values()])),
        accuracy=float(np.mean(predicted == truth)),
        ece=calibration_error(probabilities, truth),
        rows=len(truth),
        per_label=per_label,
        confusion=confusion.tolist(),
    )


def _label_score(confusion: NDArray[np.int64], index: int) -> LabelScore:
    found = int(confusion[index, index])
    support = int(confusion[index].sum())
    claimed = int(confusion[:, index].sum())
    precision = found / claimed if claimed else 0.0
    recall = found / support if support else 0.0
    f1 = 2 * precision * recall / (precision + recall) if found else 0.0
    return LabelScore(precision, recall, f1, support)


def calibration_error(probabilities: NDArray[np.float32], truth: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error over `bins` equal bins of the confidence, 0 (calibrated) to 1."""
    found = reliability(probabilities, truth, bins)
    return sum(abs(one.confidence - one.accuracy) * one.texts for one in found) / len(truth)


def reliability(
    probabilities: NDArray[np.float32], truth: NDArray[np.int64], bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Confidence against accuracy in `bins` equal bins of the confidence; empty bins are left out."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == truth
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    texts = np.bincount(which, minlength=bins)
    sums = np.bincount(which, weights=confidence, minlength=bins), np.bincount(which, weights=correct, minlength=bins)
    return tuple(
        ReliabilityBin(float(sure / count), float(right / count), int(count))
        for sure, right, count in zip(*sums, texts, strict=True)
        if count
    )


def negative_log_likelihood(logits: NDArray[np.float32], truth: NDArray[np.int64], temperature: float) -> float:
    """Mean negative log likelihood of `truth` [rows] under the softmax of `logits` [rows, labels] / `temperature`."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(scaled).sum(axis=1))
    return float(np.mean(log_sum - scaled[np.arange(len(truth)), truth]))


def fit_temperature(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """The temperature, 0.05 to 20, under which `logits` [rows, labels] explain `truth` [rows] best.

    Golden-section search over the logarithm of the temperature, in which the likelihood has one peak.
    """
    low, high, ratio = np.log(0.05), np.log(20.0), (np.sqrt(5) - 1) / 2
    for _ in range(60):
        inner_low, inner_high = high - ratio * (high - low), low + ratio * (high - low)
        left = negative_log_likelihood(logits, truth, float(np.exp(inner_low)))
        right = negative_log_likelihood(logits, truth, float(np.exp(inner_high)))
        low, high = (low, inner_high) if left < right else (inner_low, high)
    return float(np.exp((low + high) / 2))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of `logits`, row by row."""
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponent / exponent.sum(axis=1, keepdims=True), dtype=np.float32)
