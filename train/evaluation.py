"""Everything that is measured of a bundle on labelled texts, through the engine that serves it."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import Bundle, TextEncoder, probabilities
from overtone.engine import Probabilities, classify_sorted, open_engine
from train.bootstrap import Interval, intervals
from train.data import LabelledTexts
from train.robustness import perturbations
from train.scores import ReliabilityBin, Scores, calibration_error, reliability, score
from train.slices import slices_of


@dataclass(frozen=True)
class SliceScore:
    """How the texts of one kind were classified."""

    rows: int
    macro_recall: Interval
    """Over the labels that occur in the slice."""
    accuracy: Interval


@dataclass(frozen=True)
class Robustness:
    """How answers held up under a change that leaves the meaning."""

    macro_recall: float
    change: float
    """Of macro-averaged recall, against the texts as they are."""
    same_label: float
    """Share of the texts that kept the label they had got."""


@dataclass(frozen=True)
class Speed:
    """Of one pass over the texts, tokenising included, sorted by length."""

    texts_per_s: float
    tokens_per_s: float
    threads: int


@dataclass(frozen=True)
class Size:
    """What the bundle takes."""

    model_bytes: int
    tokenizer_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """All that was measured."""

    model_version: str
    data_sha256: str
    scores: Scores
    ece_before_calibration: float
    """Expected calibration error of the same scores without the bundle's temperature."""
    temperature: float
    intervals: Mapping[str, Interval]
    """Of `macro_recall`, `macro_f1` and `accuracy`."""
    slices: Mapping[str, SliceScore]
    """Of the kinds of text that the data holds any of."""
    robustness: Mapping[str, Robustness]
    speed: Speed
    size: Size
    reliability: Sequence[ReliabilityBin]
    reliability_before: Sequence[ReliabilityBin]
    baselines: Mapping[str, Scores] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the figures of `scores` stand at the top."""
        values = asdict(self)
        return {"model_version": values.pop("model_version"), **values.pop("scores"), **values}


class Reader:
    """Classifies texts with a bundle, on all cores. Use as a context."""

    def __init__(self, bundle: Bundle) -> None:
        self.threads = os.cpu_count() or 1
        self._encoder = TextEncoder(bundle)
        self._engine = open_engine(bundle, threads=self.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def read(self, texts: Sequence[str]) -> Probabilities:
        """Calibrated probabilities, float32 [texts, labels]."""
        return classify_sorted(self._engine, self._encoder.encode(texts))

    def timed(self, texts: Sequence[str]) -> tuple[Probabilities, Speed]:
        """The same, and how fast."""
        started = time.perf_counter()
        rows = self._encoder.encode(texts)
        found = classify_sorted(self._engine, rows)
        seconds = max(time.perf_counter() - started, 1e-9)
        return found, Speed(len(texts) / seconds, sum(map(len, rows)) / seconds, self.threads)


def measure(bundle: Bundle, data: LabelledTexts, *, with_robustness: bool = True) -> Evaluation:
    """Everything but the baselines of `bundle` on `data`, whose texts are taken as they were written, if it has them.

    Changed texts are classified six times over, which `with_robustness` can leave out.

    Raises:
        BundleError: the model cannot be loaded.
        EngineError: the model fails on a text.
    """
    data = replace(data, raw=data.raw or data.texts)
    with Reader(bundle) as reader:
        calibrated, speed = reader.timed(data.raw)
        robustness = _robustness(reader, data, calibrated) if with_robustness else {}
    # The scores before the softmax, up to a constant a row, which a softmax does not see.
    logits = np.log(np.maximum(calibrated, np.finfo(np.float32).tiny)) * np.float32(bundle.temperature)
    plain = probabilities(logits, 1.0)
    predicted = calibrated.argmax(axis=1)
    return Evaluation(
        model_version=bundle.version,
        data_sha256=data.sha256,
        scores=score(calibrated, data.labels, bundle.labels),
        ece_before_calibration=calibration_error(plain, data.labels),
        temperature=bundle.temperature,
        intervals=intervals(data.labels, predicted, len(bundle.labels)),
        slices=_slices(data, predicted, len(bundle.labels)),
        robustness=robustness,
        speed=speed,
        size=Size(bundle.model_path.stat().st_size, bundle.tokenizer_path.stat().st_size),
        reliability=reliability(calibrated, data.labels),
        reliability_before=reliability(plain, data.labels),
    )


def _slices(data: LabelledTexts, predicted: NDArray[np.int64], labels: int) -> dict[str, SliceScore]:
    found = {}
    for name, rows in slices_of(data.raw).items():
        if rows.any():
            figures = intervals(data.labels[rows], predicted[rows], labels)
            found[name] = SliceScore(int(rows.sum()), figures["macro_recall"], figures["accuracy"])
    return found


def _robustness(reader: Reader, data: LabelledTexts, calibrated: Probabilities) -> dict[str, Robustness]:
    labels = calibrated.shape[1]
    before = calibrated.argmax(axis=1)
    clean = intervals(data.labels, before, labels)["macro_recall"].value
    found = {}
    for name, changed in perturbations(data.raw).items():
        after = reader.read(changed).argmax(axis=1)
        recall = intervals(data.labels, after, labels)["macro_recall"].value
        found[name] = Robustness(recall, recall - clean, float(np.mean(after == before)))
    return found
