"""Reading, checking, augmenting and batching labelled texts."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.errors import DataError
from train.data import augment, length_grouped, log_prior, pad, read_labelled, read_split, share_of

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


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_bytes("\ufefflabel\ttext\r\npositive\tgood\r\nnegative\tbad\r\n".encode())
    assert read_labelled(path, NAMES).texts == ("good", "bad")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["happy\tfine", "neutral\tok"], r"line 2: label 'happy' is not one of negative, neutral, positive"),
        (["neutral\tok", "positive\t  "], r"line 3: the text is empty"),
        (["neutral\tok", "positive"], r"line 3: 1 columns where the header has 2"),
        (["neutral\ta\tb", "positive\tx"], r"line 2: 3 columns"),
        (["neutral\ta", "neutral\tb"], r"all 2 rows have the same label"),
        ([], r"holds no rows"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path: Path, rows: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_labelled(written(tmp_path, *rows), NAMES)


def test_a_report_is_short_and_holds_no_text(tmp_path: Path) -> None:
    path = written(tmp_path, *["neutral\tsecret words\textra"] * 40)
    with pytest.raises(DataError, match="40 rows cannot be used") as caught:
        read_labelled(path, NAMES)
    assert "and 35 more" in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("header", "told"), [("label\ttweet", "no column text"), ("", "no column label and no column")]
)
def test_a_missing_column_is_named(tmp_path: Path, header: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_labelled(written(tmp_path, "neutral\tok", header=header), NAMES)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_bytes(b"label\ttext\nneutral\tok\npositive\tcaf\xe9\n")
    with pytest.raises(DataError, match="line 3: is not UTF-8"):
        read_labelled(path, NAMES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.tsv: cannot be read \(FileNotFoundError\)"):
        read_labelled(tmp_path / "nowhere.tsv", NAMES)


def test_texts_of_validation_are_left_out_of_training(tmp_path: Path) -> None:
    train = written(tmp_path, "positive\thi @ann", "negative\tbad", "neutral\tso", "positive\tgood", name="train.tsv")
    validation = written(tmp_path, "positive\thi @bob", "negative\tworse", name="validation.tsv")
    split = read_split(train, validation, NAMES)
    assert split.leaked == 1
    assert split.train.texts == ("bad", "so", "good")
    assert split.train.labels.tolist() == [0, 1, 2]


def test_a_label_without_training_rows_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path, "positive\tgood", "negative\tbad", name="train.tsv")
    validation = written(tmp_path, "positive\tx", "negative\ty", name="validation.tsv")
    with pytest.raises(DataError, match="no training row is left with label neutral"):
        read_split(train, validation, NAMES)


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
