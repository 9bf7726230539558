"""Annotators who disagree, near duplicates, and the snapshot of what is left."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.erasure_files import erase_from_folder
from overtone.errors import DataError
from train.cleaning import merge_labels
from train.data import build_split
from train.duplicates import _shingles, _similarity, near_duplicates
from train.snapshot import HALVES, verify, write_snapshot
from train.sources import Row, Rows, read_rows

NAMES = ("negative", "neutral", "positive")
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=0, max_size=9).map(" ".join)


def rows(*labelled: tuple[str, str, str]) -> list[Row]:
    return [Row("s", line, label, text, annotator=who) for line, (label, text, who) in enumerate(labelled, start=1)]


def test_most_annotators_decide_and_a_tie_leaves_the_text_out() -> None:
    given_rows = rows(
        ("positive", "one", "ann"),
        ("negative", "two", "ann"),
        ("positive", "one", "bob"),
        ("negative", "one", "cid"),
        ("positive", "two", "bob"),
        ("neutral", "three", ""),
    )
    kept, findings = merge_labels(given_rows)
    assert [(row.line, row.label) for row in kept] == [(1, "positive"), (6, "neutral")]
    assert [(one.reason.split()[0], one.lines) for one in findings] == [("the", (3,)), ("most", (4,)), ("the", (2, 5))]


def test_the_last_word_of_an_annotator_counts_once() -> None:
    kept, _ = merge_labels(
        rows(("negative", "x", "ann"), ("negative", "x", "ann"), ("positive", "x", "ann"), ("positive", "x", "bob"))
    )
    assert [row.label for row in kept] == ["positive"]


@given(texts=st.lists(WORDS, max_size=12), others=st.lists(WORDS, max_size=12), percent=st.integers(30, 100))
def test_no_near_duplicate_is_missed_and_none_is_made_up(texts: list[str], others: list[str], percent: int) -> None:
    threshold = percent / 100
    pairs = itertools.product(enumerate(map(_shingles, texts)), enumerate(map(_shingles, others)))
    expected: dict[int, int] = {}
    for (index, left), (other, right) in pairs:
        if left and right and _similarity(left, right) >= threshold:
            expected.setdefault(index, other)
    assert dict(near_duplicates(texts, others, threshold=threshold)) == expected


@pytest.fixture
def sources() -> tuple[Rows, Rows]:
    train = tuple(Row("t", number, NAMES[number % 3], f"text {number}", 1000 + number, 7) for number in range(1, 10))
    validation = tuple(Row("v", number, NAMES[number % 3], f"other {number} words") for number in range(1, 7))
    return Rows("t", train, "a" * 64), Rows("v", validation, "b" * 64)


def test_a_snapshot_is_rebuilt_from_its_files_and_from_its_sources(tmp_path: Path, sources: tuple[Rows, Rows]) -> None:
    train, validation = sources
    split = build_split([train], validation, NAMES)
    place = write_snapshot(tmp_path, split, sources, NAMES)
    assert verify(place) == split.snapshot == place.name
    again = build_split([read_rows(place / HALVES[0], NAMES)], read_rows(place / HALVES[1], NAMES), NAMES)
    assert again.snapshot == split.snapshot
    assert {path.stat().st_mode & 0o077 for path in place.glob("*.parquet")} == {0}


@pytest.mark.parametrize(("posts", "authors", "gone"), [([1001, 1002], [], 2), ([], [7], 9)])
def test_an_erasure_takes_rows_out_of_a_snapshot(
    tmp_path: Path, sources: tuple[Rows, Rows], posts: list[int], authors: list[int], gone: int
) -> None:
    place = write_snapshot(tmp_path, build_split([sources[0]], sources[1], NAMES), sources, NAMES)
    assert erase_from_folder(tmp_path, posts, authors) == gone
    with pytest.raises(DataError, match=f"{gone} rows are missing|holds no rows"):
        verify(place)


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a snapshot"):
        verify(tmp_path)
