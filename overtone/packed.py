"""Batches without padding: the tokens of all rows side by side, and the few sizes that such batches have on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from overtone.shapes import MAX_BUCKET_TOKENS

Ints = NDArray[np.int64]

_STEPS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, MAX_BUCKET_TOKENS)
_TOKENS_A_ROW = 8
"""A size has room for a row for each so many of its tokens; posts are about three times as long."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch whose rows lie one after another, the shortest first."""

    ids: Ints
    """Of each token."""
    positions: Ints
    """Of each token in its row, from 0."""
    rows: Ints
    """The row of each token."""
    starts: NDArray[np.int32]
    """[rows + 1]: row `k` is the tokens from `starts[k]` to before `starts[k + 1]`."""
    groups: tuple[tuple[int, int], ...]
    """How many rows have the same length, and which, in order."""
    order: Ints
    """Where row `k` was in the batch that was packed."""

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.groups[-1][1]


@dataclass(frozen=True, slots=True)
class PackedBucket:
    """A size that smaller packed batches are filled up to."""

    tokens: int
    rows: int


def pack(token_ids: Sequence[Sequence[int]]) -> Packed:
    """The rows `token_ids`, at least one, side by side.

    Raises:
        ValueError: a row has no token.
    """
    lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
    if not lengths.size or not lengths.all():
        raise ValueError("each row needs a token, and a batch a row")
    order = lengths.argsort(kind="stable")
    lengths = lengths[order]
    starts = np.concatenate([[0], lengths.cumsum()])
    ids = np.fromiter(chain.from_iterable(token_ids[row] for row in order), np.int64, starts[-1])
    found, counts = np.unique(lengths, return_counts=True)
    return Packed(
        ids=ids,
        positions=np.arange(len(ids)) - starts[:-1].repeat(lengths),
        rows=np.arange(len(lengths)).repeat(lengths),
        starts=starts.astype(np.int32),
        groups=tuple(zip(counts.tolist(), found.tolist(), strict=True)),
        order=order,
    )


def packed_buckets() -> tuple[PackedBucket, ...]:
    """The sizes, the smallest first. At most half of a filled batch is filling, unless it is smaller than the first."""
    return tuple(PackedBucket(tokens, tokens // _TOKENS_A_ROW) for tokens in _STEPS)


def packed_bucket_for(buckets: Sequence[PackedBucket], batch: Packed) -> PackedBucket | None:
    """The smallest of `buckets` that holds `batch`; None if none does."""
    rows = len(batch.order)
    return next((one for one in buckets if batch.tokens <= one.tokens and rows <= one.rows), None)


def fill_packed(bucket: PackedBucket, batch: Packed) -> tuple[Ints, NDArray[np.int32]]:
    """Ids, positions and rows, [3, tokens], and starts, [rows + 1], of `batch` in the size of `bucket`.

    Filling is of the row `bucket.rows`, which no start is of: nothing attends to it. Rows without text have no tokens.
    """
    tokens = np.zeros((3, bucket.tokens), dtype=np.int64)
    tokens[2] = bucket.rows
    tokens[:, : batch.tokens] = batch.ids, batch.positions, batch.rows
    starts = np.full(bucket.rows + 1, batch.tokens, dtype=np.int32)
    starts[: len(batch.starts)] = batch.starts
    return tokens, starts
