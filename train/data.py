"""Labelled texts: checked, split, normalised and cut into batches. No torch in here."""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from overtone.errors import DataError
from overtone.text import normalise
from train.cleaning import content_hash, merge_labels, without_validation
from train.sources import Finding, Row, Rows, read_rows, report, require_classes

_LINK = re.compile(r"(?:^|(?<=\s))http(?=\s|$) ?")
_MENTION = re.compile(r"(?:^|(?<=\s))@user(?=\s|[.,:;!?]|$) ?")

Leaks = Literal["stop", "drop"]
"""What to do when training holds texts of validation, word by word."""


@dataclass(frozen=True)
class LabelledTexts:
    """Normalised texts and the index of each one's label."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """Shape [texts]."""
    sha256: str = ""
    """Of what they were read from."""
    raw: tuple[str, ...] = ()
    """The same texts before they were normalised; empty where nothing needs them."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Split:
    """The two halves of the data of a run, with no text in both."""

    train: LabelledTexts
    validation: LabelledTexts
    dropped: tuple[Finding, ...] = ()
    """Training rows that were left out, and why."""
    snapshot: str = ""
    """Content hash of both halves: the same texts with the same labels in the same order have the same."""
    rows: tuple[tuple[Row, ...], tuple[Row, ...]] = ((), ())
    """What the halves were made of."""


def read_split(train: Path, validation: Path, names: Sequence[str], *, leaks: Leaks = "stop") -> Split:
    """Read both files and make the halves of a run of them.

    Raises:
        DataError: as `read_rows` and `build_split`.
    """
    return build_split([read_rows(train, names)], read_rows(validation, names), names, leaks=leaks)


def build_split(train: Sequence[Rows], validation: Rows, names: Sequence[str], *, leaks: Leaks = "stop") -> Split:
    """The halves of a run, of which training has each text once, with the label most of its annotators gave.

    Texts whose annotators disagree evenly, and near duplicates of texts of validation, are left out and told. What
    validation holds word by word is left out too with `leaks` at "drop".

    Raises:
        DataError: with `leaks` at "stop", validation holds texts of training; or no row is left with some label, or
            either half has only one.
    """
    require_classes(validation)
    kept, conflicts = merge_labels(row for source in train for row in source.rows)
    kept, leaked, near = without_validation(kept, validation.rows)
    if leaked and leaks == "stop":
        hint = "training on them would flatter the result; take them out, or --set data.leaks=drop leaves them out"
        raise DataError(f"{report(leaked)}\n{hint}")
    sources = ", ".join(one.name for one in train)
    missing = [name for name in names if all(row.label != name for row in kept)]
    if len(missing) == len(names) - 1:
        raise DataError(f"{sources}: all {len(kept)} rows have the same label; a classifier needs at least two")
    if missing:
        raise DataError(f"{sources}: no training row is left with label {', '.join(missing)}; every label needs some")
    digest = train[0].sha256 if len(train) == 1 else _digest(one.sha256 for one in train)
    halves = _labelled(kept, names, digest), _labelled(validation.rows, names, validation.sha256)
    dropped, snapshot = (*conflicts, *leaked, *near), content_hash(kept, validation.rows)
    return Split(*halves, dropped, snapshot, (tuple(kept), validation.rows))


def read_labelled(path: Path, names: Sequence[str]) -> LabelledTexts:
    """The texts of a file that a model is measured on, as they stand.

    Raises:
        DataError: as `read_rows`, or all rows have one label.
    """
    rows = read_rows(path, names)
    require_classes(rows)
    return _labelled(rows.rows, names, rows.sha256)


def _labelled(rows: Sequence[Row], names: Sequence[str], sha256: str) -> LabelledTexts:
    index_of = {name: index for index, name in enumerate(names)}
    labels = np.asarray([index_of[row.label] for row in rows], dtype=np.int64)
    raw = tuple(row.text for row in rows)
    return LabelledTexts(tuple(map(normalise, raw)), labels, sha256, raw)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def log_prior(labels: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Natural logarithm of each label's share of `labels`, shape [count]. Every label must occur."""
    shares = np.bincount(labels, minlength=count) / len(labels)
    return np.log(shares).astype(np.float32)


def augment(texts: Sequence[str], rng: random.Random, *, drop_links: float, drop_mentions: float) -> list[str]:
    """Return `texts` with the links or the mentions of some taken out, each by its own chance; none becomes empty."""
    augmented = []
    for text in texts:
        changed = text
        if drop_links and rng.random() < drop_links:
            changed = _LINK.sub("", changed)
        if drop_mentions and rng.random() < drop_mentions:
            changed = _MENTION.sub("", changed)
        augmented.append(changed.strip() or text)
    return augmented


def alter(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Return of each text something like it that nobody wrote, for models to be asked about; none becomes empty.

    By equal chance: some of its words are left out; some are replaced by words of other texts; or a part of it is
    continued by a part of another text.
    """
    words = [text.split() for text in texts]
    every = [word for row in words for word in row]
    return [" ".join(rng.choice(_ALTERATIONS)(row, rng, words, every)) for row in words]


def _leave_out(row: list[str], rng: random.Random, _words: list[list[str]], _every: list[str]) -> list[str]:
    return [word for word in row if rng.random() >= _ALTERED_WORDS] or row


def _replace(row: list[str], rng: random.Random, _words: list[list[str]], every: list[str]) -> list[str]:
    return [rng.choice(every) if rng.random() < _ALTERED_WORDS else word for word in row]


def _continue(row: list[str], rng: random.Random, words: list[list[str]], _every: list[str]) -> list[str]:
    other = rng.choice(words)
    return row[: max(rng.randint(len(row) // 3, len(row)), 1)] + other[rng.randint(len(other) // 3, len(other)) :]


_ALTERED_WORDS = 0.15
_ALTERATIONS = (_leave_out, _replace, _continue)


def length_grouped(lengths: Sequence[int], batch_size: int, group_batches: int, rng: random.Random) -> list[list[int]]:
    """Cut row numbers into batches of rows of similar length, in random order.

    Rows are shuffled, sorted by length within groups of `group_batches` batches and cut. The last batch may be short.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    span = batch_size * group_batches
    batches = []
    for start in range(0, len(order), span):
        group = order[start : start + span]
        if group_batches > 1:
            group = sorted(group, key=lambda row: lengths[row])
        batches += [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
    rng.shuffle(batches)
    return batches


def share_of(batch: list[int], rank: int, world: int) -> list[int]:
    """The rows of a step that worker `rank` of `world` takes: as many as every other worker's, never none.

    A batch with fewer rows than workers starts again from its first row, because all workers must take every step.
    """
    rows = -(-len(batch) // world)
    return [batch[(rank + world * turn) % len(batch)] for turn in range(rows)]


def pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask, both [rows, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask
