"""Reading, checking, augmenting and batching labelled texts."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.errors import DataError
from train.data import alter, augment, length_grouped, log_prior, pad, read_labelled, read_split, share_of

NAMES = ("negative", "neutral", "positive")


def written(tmp_path: Path, *rows: str, name: str = "data.tsv", header: str = "label\ttext") -> Path:
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_texts_are_normalised_and_labels_numbered(tmp_path: Path) -> None:
    path = written(tmp_path, "positive\tthanks @ann https://t.co/x", 'negative\t"awful', "")
    found = read_labelled(path, NAMES)
    assert found.texts == ("thanks @user http", '"awful')
    assert found.labels.tolist() == [2, 0]


def test_columns_may_stand_in_any_order_and_more_may_be_there(tmp_path: Path) -> None:
    path = written(tmp_path, "1\tgood\tpositive", "2\tbad\tnegative", header="id\ttext\tlabel")
    assert read_labelled(path, NAMES).texts == ("good", "bad")


def test_texts_of_validation_stop_before_training(tmp_path: Path) -> None:
    train = written(tmp_path, "positive\thi @ann", "negative\tbad", "neutral\tso", "positive\tgood", name="train.tsv")
    validation = written(tmp_path, "positive\thi @bob", "negative\tworse", name="validation.tsv")
    with pytest.raises(DataError, match=r"train\.tsv: 1 row: the same text is in validation \(line 2\)") as caught:
        read_split(train, validation, NAMES)
    assert "hi" not in re.findall(r"\w+", caught.value.message)
    split = read_split(train, validation, NAMES, leaks="drop")
    assert [finding.lines for finding in split.dropped] == [(2,)]
    assert split.train.texts == ("bad", "so", "good")
    assert split.train.labels.tolist() == [0, 1, 2]


def test_what_validation_nearly_holds_is_left_out(tmp_path: Path) -> None:
    long = "the new update broke every single thing that I liked about this phone last week"
    train = written(tmp_path, f"negative\tRT @ann: {long.title()}!!", "neutral\tso", "positive\tgood", "negative\tno")
    validation = written(tmp_path, f"negative\t{long}", "positive\tfine", name="validation.tsv")
    split = read_split(train, validation, NAMES)
    assert split.train.texts == ("so", "good", "no")
    assert [str(one).split(": ", 1)[1] for one in split.dropped] == [
        "1 row: nearly the same text is in validation (line 2)"
    ]


def test_a_label_without_training_rows_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path, "positive\tgood", "negative\tbad", name="train.tsv")
    validation = written(tmp_path, "positive\tx", "negative\ty", name="validation.tsv")
    with pytest.raises(DataError, match="no training row is left with label neutral"):
        read_split(train, validation, NAMES)


def test_one_class_is_refused_in_either_half(tmp_path: Path) -> None:
    one = written(tmp_path, "neutral\ta", "neutral\tb", name="one.tsv")
    more = written(tmp_path, "positive\tx", "negative\ty", "neutral\tz", name="more.tsv")
    for train, validation in ((one, more), (more, one)):
        with pytest.raises(DataError, match="all 2 rows have the same label"):
            read_split(train, validation, NAMES)


def test_the_content_hash_is_of_texts_labels_and_order(tmp_path: Path) -> None:
    rows = ["positive\tgood", "negative\tbad", "neutral\tso"]
    validation = written(tmp_path, "positive\tx", "negative\ty", name="validation.tsv")

    def snapshot(*lines: str) -> str:
        return read_split(written(tmp_path, *lines, name="train.tsv"), validation, NAMES).snapshot

    found = snapshot(*rows)
    assert found == snapshot(*rows) == snapshot(*rows, "positive\tgood")
    assert found not in {
        snapshot(*rows[::-1]),
        snapshot(*rows, "positive\tmore"),
        snapshot("positive\tbad", *rows[2:], "negative\tgood"),
    }


def test_log_prior_is_the_log_of_the_shares() -> None:
    assert np.exp(log_prior(np.array([0, 1, 1, 2]), 3)).tolist() == pytest.approx([0.25, 0.5, 0.25])


def test_links_and_mentions_go_by_chance() -> None:
    texts = ["see http now", "@user hi @user", "http", "https is a scheme, @users too"]
    gone = augment(texts, random.Random(0), drop_links=1, drop_mentions=1)
    assert gone == ["see now", "hi", "http", "https is a scheme, @users too"]
    assert augment(texts, random.Random(0), drop_links=0, drop_mentions=0) == texts
    half = augment(["a http"] * 1000, random.Random(0), drop_links=0.5, drop_mentions=0)
    assert 400 < half.count("a") < 600


@given(
    lengths=st.lists(st.integers(1, 128), min_size=1, max_size=300),
    batch=st.integers(1, 40),
    group=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_batches_hold_every_row_once(lengths: list[int], batch: int, group: int, seed: int) -> None:
    batches = length_grouped(lengths, batch, group, random.Random(seed))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert sum(len(rows) != batch for rows in batches) <= 1
    assert batches == length_grouped(lengths, batch, group, random.Random(seed))


def test_length_grouping_saves_padding() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(5, 100) for _ in range(3200)]

    def padded(group: int) -> int:
        batches = length_grouped(lengths, 32, group, random.Random(2))
        return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)

    assert padded(50) < 1.05 * sum(lengths) < padded(1) * 0.7


@given(batch=st.lists(st.integers(0, 999), min_size=1, max_size=70, unique=True), world=st.integers(1, 8))
def test_workers_take_equal_shares_that_cover_the_batch(batch: list[int], world: int) -> None:
    shares = [share_of(batch, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(batch) // world)}
    assert {row for share in shares for row in share} == set(batch)


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad([[1, 2, 3], [4]], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(
    st.lists(st.lists(st.sampled_from("a b c d e f".split()), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(),
)
def test_altered_texts_are_of_the_same_words_and_none_is_empty(rows: list[list[str]], seed: int) -> None:
    texts = [" ".join(row) for row in rows]
    altered = alter(texts, random.Random(seed))
    assert len(altered) == len(texts)
    known = {word for row in rows for word in row}
    assert all(text and set(text.split()) <= known for text in altered)
    assert altered == alter(texts, random.Random(seed))


def test_most_texts_are_altered() -> None:
    texts = [" ".join(f"w{number}" for number in range(start, start + 20)) for start in range(0, 4000, 20)]
    altered = alter(texts, random.Random(0))
    assert sum(one != other for one, other in zip(texts, altered, strict=True)) > 0.9 * len(texts)
    kept = [len(set(one.split()) & set(other.split())) for one, other in zip(texts, altered, strict=True)]
    assert 12 < sum(kept) / len(kept) < 19
