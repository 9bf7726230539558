"""Rules that make training rows fit to learn from: one label a text, and nothing that validation holds."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from overtone.text import TEXT_VERSION, normalise
from train.duplicates import near_duplicates
from train.sources import Finding, Row

Findings = tuple[Finding, ...]


def merge_labels(rows: Iterable[Row]) -> tuple[list[Row], Findings]:
    """Each text once, where its first row stands, with the label that most of its annotators gave.

    Of an annotator who labelled a text more than once, the last label counts; rows that name nobody count as one
    annotator each. Texts without a majority are left out. Returns the rows and what was left out.
    """
    by_text: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_text[normalise(row.text)].append(row)
    kept, repeated, outvoted, undecided = [], list[Row](), list[Row](), list[Row]()
    for same in by_text.values():
        label = _majority(same)
        if label is None:
            undecided += same
            continue
        chosen = next(row for row in same if row.label == label)
        kept.append(chosen)
        repeated += [row for row in same if row.label == label and row is not chosen]
        outvoted += [row for row in same if row.label != label]
    return kept, (
        *_findings("the same text again, with the same label", repeated),
        *_findings("most annotators gave the same text another label", outvoted),
        *_findings("the annotators of the same text disagree evenly", undecided),
    )


def without_validation(rows: Sequence[Row], validation: Sequence[Row]) -> tuple[list[Row], Findings, Findings]:
    """`rows` without those that validation holds; what it holds word by word; and what it holds nearly so."""
    held = [normalise(row.text) for row in validation]
    known = set(held)
    texts = [normalise(row.text) for row in rows]
    near = {index for index, _ in near_duplicates(texts, held)}
    kept, leaked, nearly = list[Row](), list[Row](), list[Row]()
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        (leaked if text in known else nearly if index in near else kept).append(row)
    return (
        kept,
        _findings("the same text is in validation", leaked),
        _findings("nearly the same text is in validation", nearly),
    )


def content_hash(train: Iterable[Row], validation: Iterable[Row]) -> str:
    """SHA-256 of what a model learns from and is chosen by: labels and normalised texts, in their order."""
    digest = hashlib.sha256(b"text %d\n" % TEXT_VERSION)
    for part in (train, validation):
        digest.update(b"part\n")
        for row in part:
            digest.update(f"{row.label}\t{normalise(row.text)}\n".encode())
    return digest.hexdigest()


def _majority(rows: Iterable[Row]) -> str | None:
    votes: dict[object, str] = {}
    for number, row in enumerate(rows):
        votes[row.annotator or number] = row.label
    (label, most), *others = Counter(votes.values()).most_common(2)
    return None if others and others[0][1] == most else label


def _findings(reason: str, rows: Iterable[Row]) -> Findings:
    by_source: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row.line)
    return tuple(Finding(name, reason, tuple(sorted(lines))) for name, lines in by_source.items())
