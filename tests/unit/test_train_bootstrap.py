"""Confidence intervals: what they must contain, and that comparing on the same texts is sharper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.bootstrap import intervals, paired_difference


def draw(rows: int, right: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and predictions of which the share `right` is right."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, rows)
    return truth, np.where(rng.random(rows) < right, truth, (truth + 1) % 3)


@given(seed=st.integers(0, 1000), right=st.floats(0, 1), rows=st.integers(1, 300))
def test_bounds_are_in_order_and_within_range(seed: int, right: float, rows: int) -> None:
    truth, predicted = draw(rows, right, seed)
    for one in intervals(truth, predicted, 3).values():
        assert 0 <= one.low <= one.high <= 1
        assert 0 <= one.value <= 1


def test_the_same_rows_give_the_same_bounds() -> None:
    truth, predicted = draw(200, 0.7)
    assert intervals(truth, predicted, 3) == intervals(truth, predicted, 3)


def test_bounds_are_those_of_drawing_the_rows_themselves() -> None:
    truth, predicted = draw(400, 0.8)
    rng = np.random.default_rng(5)
    accuracies = [np.mean((truth == predicted)[rng.integers(0, 400, 400)]) for _ in range(3000)]
    found = intervals(truth, predicted, 3)["accuracy"]
    assert (found.low, found.high) == pytest.approx(np.quantile(accuracies, [0.025, 0.975]), abs=0.006)


def test_a_label_without_texts_is_left_out_of_the_mean() -> None:
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
    assert intervals(truth, predicted, 3)["macro_recall"].value == pytest.approx(0.75)


def test_a_model_differs_from_itself_by_nothing() -> None:
    truth, predicted = draw(300, 0.7)
    found = paired_difference(truth, predicted, predicted, 3)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero


def test_pairing_sees_what_two_intervals_cannot() -> None:
    truth, champion = draw(1000, 0.70)
    wrong = np.flatnonzero(truth != champion)[:25]
    challenger = champion.copy()
    challenger[wrong] = truth[wrong]
    found = paired_difference(truth, challenger, champion, 3)
    assert found.excludes_zero
    assert found.value > 0
    apart = [intervals(truth, one, 3)["macro_recall"] for one in (champion, challenger)]
    assert apart[0].high > apart[1].low


def test_the_difference_changes_sign_with_the_sides() -> None:
    truth, better = draw(500, 0.9)
    _, worse = draw(500, 0.6, seed=1)
    assert paired_difference(truth, better, worse, 3).value == pytest.approx(
        -paired_difference(truth, worse, better, 3).value
    )
