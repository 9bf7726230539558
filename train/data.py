"""Labelled texts: read from a file, checked, normalised, encoded and cut into batches. No torch in here."""

import csv
import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overtone.errors import DataError
from overtone.text import normalise

_LINK = re.compile(r"(?:^|(?<=\s))http(?=\s|$) ?")
_MENTION = re.compile(r"(?:^|(?<=\s))@user(?=\s|[.,:;!?]|$) ?")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class LabelledTexts:
    """Normalised texts and the index of each one's label."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """Shape [texts]."""
    sha256: str = ""
    """Of the file they were read from."""
    raw: tuple[str, ...] = ()
    """The same texts before they were normalised; empty where nothing needs them."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Split:
    """The two halves of the data of a run, with no text in both."""

    train: LabelledTexts
    validation: LabelledTexts
    leaked: int
    """Training rows left out because validation holds the same text."""


def read_split(train: Path, validation: Path, names: Sequence[str]) -> Split:
    """Read both files and leave out of training every text that validation holds.

    Raises:
        DataError: as `read_labelled`, or when nothing or only one class is left to train on.
    """
    held_out = read_labelled(validation, names)
    rows = read_labelled(train, names)
    known = set(held_out.texts)
    keep = [index for index, text in enumerate(rows.texts) if text not in known]
    kept = LabelledTexts(tuple(rows.texts[index] for index in keep), rows.labels[keep], rows.sha256)
    missing = [name for index, name in enumerate(names) if index not in kept.labels]
    if missing:
        raise DataError(f"{train}: no training row is left with label {', '.join(missing)}; every label needs some")
    return Split(kept, held_out, leaked=len(rows) - len(kept))


def read_labelled(path: Path, names: Sequence[str]) -> LabelledTexts:
    """Read a tab-separated file with the columns `label` and `text`, UTF-8, one row a line.

    Raises:
        DataError: naming the file and the first lines that are wrong: not UTF-8, a missing column, a label that is
            not in `names`, an empty text; or that the file holds no rows or a single class. Never the text itself.
    """
    raw = _read_bytes(path)
    lines = _decode(path, raw)
    header = lines[0].split("\t") if lines else []
    absent = [column for column in ("label", "text") if column not in header]
    if absent:
        raise DataError(
            f"{path}, line 1: no column {' and no column '.join(absent)}; the header must be label<TAB>text"
        )
    rows = csv.reader(lines[1:], delimiter="\t", quoting=csv.QUOTE_NONE)
    index_of = {name: index for index, name in enumerate(names)}
    texts, raw_texts, labels, problems = [], [], [], []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        problem = _problem(row, header, index_of)
        if problem:
            problems.append(f"line {number}: {problem}")
            continue
        raw_texts.append(row[header.index("text")])
        texts.append(normalise(raw_texts[-1]))
        labels.append(index_of[row[header.index("label")]])
    if problems:
        raise DataError(_report(path, problems))
    _require_classes(path, Counter(labels))
    digest = hashlib.sha256(raw).hexdigest()
    return LabelledTexts(tuple(texts), np.asarray(labels, dtype=np.int64), digest, tuple(raw_texts))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None


def _decode(path: Path, raw: bytes) -> list[str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: is not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _problem(row: Sequence[str], header: Sequence[str], index_of: dict[str, int]) -> str | None:
    if len(row) != len(header):
        return f"{len(row)} columns where the header has {len(header)}"
    if row[header.index("label")] not in index_of:
        return f"label {row[header.index('label')][:40]!r} is not one of {', '.join(index_of)}"
    if not normalise(row[header.index("text")]):
        return "the text is empty"
    return None


def _report(path: Path, problems: Sequence[str]) -> str:
    shown = "\n".join(problems[:_SHOWN_PROBLEMS])
    more = f"\nand {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"{path}: {len(problems)} rows cannot be used\n{shown}{more}"


def _require_classes(path: Path, counts: Counter[int]) -> None:
    if not counts:
        raise DataError(f"{path}: holds no rows")
    if len(counts) == 1:
        raise DataError(f"{path}: all {counts.total()} rows have the same label; a classifier needs at least two")


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
