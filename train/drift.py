"""How far two stretches of predictions lie apart. Pure."""

import math
from collections.abc import Sequence

from overtone.db.retrain import Profile

_BINS = 10


def label_psi(reference: Profile, recent: Profile) -> float:
    """Population-stability index of the predicted labels."""
    names = sorted({*reference.labels, *recent.labels})
    return stability_index([reference.labels.get(name, 0) for name in names], [recent.labels.get(n, 0) for n in names])


def confidence_psi(reference: Profile, recent: Profile) -> float:
    """Population-stability index of the confidence, in ten bins or fewer that hold about as many of the reference."""
    bounds = _bounds(reference.buckets)
    return stability_index(_merged(reference.buckets, bounds), _merged(recent.buckets, bounds))


def stability_index(reference: Sequence[int], recent: Sequence[int]) -> float:
    """`sum((p - q) ln(p / q))` over the shares p and q that two lists of counts, bin by bin, make of their sums.

    Half a count is added to each bin, so that an empty one makes no infinity. Below 0.1 little has changed, above 0.2
    much.
    """
    before, after = _shares(reference), _shares(recent)
    return sum((p - q) * math.log(p / q) for p, q in zip(after, before, strict=True))


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + 0.5 * len(counts)
    return [(count + 0.5) / total for count in counts]


def _bounds(counts: Sequence[int]) -> list[int]:
    """Where bins end, so that each but the last holds at least a tenth."""
    wanted, held, ends = sum(counts) / _BINS, 0, []
    for index, count in enumerate(counts):
        held += count
        if held >= wanted:
            ends.append(index + 1)
            held = 0
    return [*ends[:-1], len(counts)] if ends else [len(counts)]


def _merged(counts: Sequence[int], ends: Sequence[int]) -> list[int]:
    starts = [0, *ends[:-1]]
    return [sum(counts[start:end]) for start, end in zip(starts, ends, strict=True)]
