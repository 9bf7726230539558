"""Rows side by side: every token once, in its place, and nothing else but filling that belongs to no row."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.packed import PackedBucket, fill_packed, pack, packed_bucket_for, packed_buckets
from overtone.shapes import MAX_BUCKET_TOKENS

ROWS = st.lists(st.lists(st.integers(0, 30_000), min_size=1, max_size=40), min_size=1, max_size=30)


@given(ROWS)
def test_every_row_is_found_again_whole(token_ids: list[list[int]]) -> None:
    batch = pack(token_ids)
    assert batch.tokens == sum(map(len, token_ids))
    assert batch.longest == max(map(len, token_ids))
    found = [batch.ids[start:end].tolist() for start, end in pairwise(batch.starts)]
    assert found == [token_ids[row] for row in batch.order]
    assert batch.positions.tolist() == [place for row in found for place in range(len(row))]
    assert batch.rows.tolist() == [number for number, row in enumerate(found) for _ in row]


@given(ROWS)
def test_rows_of_one_length_are_neighbours(token_ids: list[list[int]]) -> None:
    batch = pack(token_ids)
    lengths = [length for rows, length in batch.groups for _ in range(rows)]
    assert lengths == np.diff(batch.starts).tolist() == sorted(map(len, token_ids))
    assert len({length for _, length in batch.groups}) == len(batch.groups)


@pytest.mark.parametrize("token_ids", [[], [[1, 2], []]])
def test_a_row_without_tokens_is_refused(token_ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="needs a token"):
        pack(token_ids)


@given(ROWS)
def test_a_batch_gets_the_smallest_bucket_that_holds_it(token_ids: list[list[int]]) -> None:
    buckets, batch = packed_buckets(), pack(token_ids)
    bucket = packed_bucket_for(buckets, batch)
    holding = [one for one in buckets if one.tokens >= batch.tokens and one.rows >= len(token_ids)]
    assert bucket == (min(holding, key=lambda one: one.tokens) if holding else None)


def test_buckets_grow_by_at_most_double() -> None:
    tokens = [one.tokens for one in packed_buckets()]
    assert tokens[-1] == MAX_BUCKET_TOKENS
    assert all(small < large <= 2 * small for small, large in pairwise(tokens))


@given(ROWS)
def test_filling_belongs_to_no_row(token_ids: list[list[int]]) -> None:
    batch = pack(token_ids)
    bucket = PackedBucket(batch.tokens + 5, len(token_ids) + 2)
    tokens, starts = fill_packed(bucket, batch)
    assert tokens.shape == (3, bucket.tokens)
    np.testing.assert_array_equal(tokens[:, : batch.tokens], [batch.ids, batch.positions, batch.rows])
    assert tokens[2, batch.tokens :].tolist() == [bucket.rows] * 5
    assert not tokens[:2, batch.tokens :].any()
    assert starts.dtype == np.int32
    assert starts.tolist() == [*batch.starts.tolist(), batch.tokens, batch.tokens]
