"""The texts that are classified: made up, or those of a file."""

import csv
from pathlib import Path

from ingest.posts import Generator
from overtone.errors import DataError


def synthetic_texts(count: int, seed: int = 7) -> list[str]:
    """Invented posts, the same for the same seed: 22 tokens on average, one in a hundred over 100."""
    posts = Generator(seed)
    return [posts.draft(number).text for number in range(count)]


def read_texts(path: Path) -> list[str]:
    """The column `text` of a TSV file with a header line; empty ones are left out.

    Raises:
        DataError: the file has no such column or no text.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if "text" not in (rows.fieldnames or ()):
            raise DataError(f"{path}: the first line must name a column `text`, columns apart by tabs")
        texts = [row["text"] for row in rows if row["text"] and row["text"].strip()]
    if not texts:
        raise DataError(f"{path}: holds no text")
    return texts


def with_long_texts(texts: list[str]) -> list[str]:
    """`texts` with every tenth one replaced by six of them in one."""
    return [
        " ".join(texts[(number + step) % len(texts)] for step in range(6)) if number % 10 == 0 else text
        for number, text in enumerate(texts)
    ]
