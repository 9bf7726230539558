"""How sure a figure is: confidence intervals by the bootstrap. Pure numpy.

Every figure here follows from how many texts there are of each (true label, predicted label), so drawing texts with
replacement is drawing those counts from a multinomial, which takes milliseconds for thousands of rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 2000
LEVEL = 0.95
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds between which it lies with a confidence of `LEVEL`."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether chance alone is no explanation for the figure being above or below 0."""
        return self.low > 0 or self.high < 0


def intervals(truth: NDArray[np.int64], predicted: NDArray[np.int64], labels: int) -> dict[str, Interval]:
    """`macro_recall`, `macro_f1` and `accuracy` of the labels `predicted` [rows] for the `truth` [rows].

    A label without a row is left out of the means. The same input gives the same bounds.
    """
    cells = _count([truth, predicted], labels)
    drawn = _draw(cells)
    return {name: _interval(figure(cells[None])[0], figure(drawn)) for name, figure in _FIGURES.items()}


def paired_difference(
    truth: NDArray[np.int64], challenger: NDArray[np.int64], champion: NDArray[np.int64], labels: int
) -> Interval:
    """Macro-averaged recall of the labels `challenger` [rows] less that of `champion` [rows], on the same texts.

    Both are compared on every draw of the texts, so what makes a text hard for both does not widen the bounds.
    """
    cells = _count([truth, challenger, champion], labels)
    drawn = _draw(cells)

    def difference(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return macro_recall(counts.sum(axis=3)) - macro_recall(counts.sum(axis=2))

    return _interval(difference(cells[None])[0], difference(drawn))


def macro_recall(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each confusion matrix in [rounds, true label, predicted label], over the labels that occur in it."""
    return _mean_of_present(_ratio(_diagonal(confusion), confusion.sum(axis=2)), confusion)


def _macro_f1(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    both = confusion.sum(axis=1) + confusion.sum(axis=2)
    return _mean_of_present(_ratio(2 * _diagonal(confusion), both), confusion)


def _accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    return _ratio(_diagonal(confusion).sum(axis=1), confusion.sum(axis=(1, 2)))


_FIGURES = {"macro_recall": macro_recall, "macro_f1": _macro_f1, "accuracy": _accuracy}


def _count(columns: Sequence[NDArray[np.int64]], labels: int) -> NDArray[np.int64]:
    cells = np.zeros((labels,) * len(columns), dtype=np.int64)
    np.add.at(cells, tuple(columns), 1)
    return cells


def _draw(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = int(cells.sum())
    drawn = np.random.default_rng(_SEED).multinomial(rows, (cells / rows).ravel(), size=ROUNDS)
    return drawn.reshape(ROUNDS, *cells.shape)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [outside, 1 - outside])
    return Interval(float(value), float(low), float(high))


def _diagonal(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.diagonal(confusion, axis1=1, axis2=2)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return part / np.maximum(whole, 1)


def _mean_of_present(values: NDArray[np.float64], confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    present = confusion.sum(axis=2) > 0
    return np.asarray((values * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1))
