"""Near duplicates: texts that say the same in nearly the same words, found exactly and without comparing all pairs.

Two texts are compared by the Jaccard similarity of their words and pairs of neighbouring words, whatever their case,
punctuation, mentions and links. The join filters by prefix (Chaudhuri et al. 2006, "A primitive operator for
similarity joins"): of two sets that are similar enough, the rarest few members of one and of the other must share one.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

THRESHOLD = 0.8
"""Similarity from which two texts count as the same: one word in fifteen may differ."""

_WORD = re.compile(r"[^\W_]+")
_PLACEHOLDERS = frozenset({"http", "user", "rt"})

_Shingles = frozenset[str]


def near_duplicates(
    texts: Sequence[str], others: Sequence[str], *, threshold: float = THRESHOLD
) -> list[tuple[int, int]]:
    """The first of `others` that each of `texts` nearly repeats, as (index in `texts`, index in `others`).

    Texts are expected normalised. Texts without a word, and those that repeat none, are not in the answer.
    """
    ours, theirs = [_shingles(text) for text in texts], [_shingles(text) for text in others]
    counts = Counter(one for shingles in theirs for one in shingles)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for index, shingles in enumerate(theirs):
        for one in _prefix(shingles, counts, threshold):
            holders[one].append(index)
    found = []
    for index, shingles in enumerate(ours):
        candidates = {holder for one in _prefix(shingles, counts, threshold) for holder in holders.get(one, ())}
        same = [other for other in candidates if _similarity(shingles, theirs[other]) >= threshold]
        if same:
            found.append((index, min(same)))
    return found


def _shingles(text: str) -> _Shingles:
    words = [word for word in _WORD.findall(text.casefold()) if word not in _PLACEHOLDERS]
    return frozenset([*words, *(f"{left} {right}" for left, right in pairwise(words))])


def _prefix(shingles: _Shingles, counts: Counter[str], threshold: float) -> list[str]:
    """The rarest members, of which two sets as similar as `threshold` share at least one."""
    size = len(shingles)
    kept = size - _at_least(threshold * size) + 1
    return sorted(shingles, key=lambda one: (counts[one], one))[:kept] if size else []


def _at_least(number: float) -> int:
    # A product such as 0.8 * 5 may come out a hair above the whole number it stands for.
    return -int(-(number - 1e-9) // 1)


def _similarity(left: _Shingles, right: _Shingles) -> float:
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
