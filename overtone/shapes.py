"""The shapes that batches have on a GPU: buckets of rows and tokens, and the bounds between which TensorRT builds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BATCH_TOKENS = 16_384
"""Most padded tokens a batch is planned to have, on any machine."""
MAX_BUCKETS = 28
"""Each is a captured graph, with memory of its own on the device and a moment at load."""
MAX_BUCKET_TOKENS = 2048
"""Above this a GPU is busy for longer than starting its kernels takes, and padding costs more than a graph saves."""

_MAX_ROWS = 128
_USUAL_ROWS = 32
_MIN_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape that smaller batches are padded to."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Padded tokens of a batch of this shape."""
        return self.rows * self.length


def shape_buckets(max_length: int) -> tuple[Bucket, ...]:
    """At most `MAX_BUCKETS` shapes for texts of up to `max_length` tokens, the smallest first.

    Rows and lengths double, so that less than three quarters of a padded batch are padding unless it is shorter than
    the shortest bucket. Where there would be too many, the largest are left out.
    """
    lengths = [_MIN_LENGTH]
    while lengths[-1] < max_length:
        lengths.append(lengths[-1] * 2)
    rows = [1 << power for power in range(_MAX_ROWS.bit_length())]
    # A position beyond the longest text has no embedding.
    shapes = {Bucket(count, min(length, max_length)) for count in rows for length in lengths}
    fitting = sorted((one for one in shapes if one.tokens <= MAX_BUCKET_TOKENS), key=_order)
    return tuple(fitting[:MAX_BUCKETS])


def bucket_for(buckets: Sequence[Bucket], rows: int, length: int) -> Bucket | None:
    """The one of `buckets` with the fewest tokens that holds `rows` of `length` tokens; None if none does."""
    holding = [one for one in buckets if rows <= one.rows and length <= one.length]
    return min(holding, key=_order) if holding else None


def fill(bucket: Bucket, ids: NDArray[Any], mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """`ids` and `mask` in the shape of `bucket`.

    A row that stands for no text has one token that is looked at: attention over none is not a number.
    """
    rows, length = ids.shape
    padded_ids = np.zeros((bucket.rows, bucket.length), dtype=ids.dtype)
    padded_mask = np.zeros_like(padded_ids)
    padded_ids[:rows, :length] = ids
    padded_mask[:rows, :length] = mask
    padded_mask[rows:, 0] = 1
    return padded_ids, padded_mask


@dataclass(frozen=True, slots=True)
class Profile:
    """Between which shapes of a batch an engine of TensorRT runs, and the one it is tuned for."""

    least: Bucket
    usual: Bucket
    most: Bucket

    def options(self, names: Sequence[str]) -> dict[str, str]:
        """As ONNX Runtime wants them told, for the inputs `names`."""
        shapes = {"min": self.least, "opt": self.usual, "max": self.most}
        return {
            f"trt_profile_{kind}_shapes": ",".join(f"{name}:{one.rows}x{one.length}" for name in names)
            for kind, one in shapes.items()
        }


def shape_profile(max_length: int, batch_tokens: int = MAX_BATCH_TOKENS) -> Profile:
    """For texts of up to `max_length` tokens in batches of up to `batch_tokens` padded tokens, or one row.

    A batch of short texts may have more rows than the largest shape; it is run in parts.
    """
    rows = max(1, batch_tokens // max_length)
    return Profile(
        Bucket(1, 1), Bucket(min(rows, _USUAL_ROWS), min(max_length, 2 * _MIN_LENGTH)), Bucket(rows, max_length)
    )


def _order(bucket: Bucket) -> tuple[int, int]:
    return bucket.tokens, bucket.rows
