"""Macro-averaged recall and its companions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.scores import calibration_error, fit_temperature, negative_log_likelihood, score, softmax

NAMES = ("negative", "neutral", "positive")


def one_hot(labels: list[int]) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[labels]


def test_figures_of_a_small_case() -> None:
    truth = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    scores = score(one_hot([0, 1, 1, 1, 1, 0, 2, 2]), truth, NAMES)
    assert scores.confusion == [[1, 1, 0], [1, 3, 0], [0, 0, 2]]
    assert scores.macro_recall == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert scores.accuracy == pytest.approx(6 / 8)
    assert scores.per_label["neutral"].precision == pytest.approx(0.75)
    assert scores.per_label["negative"].f1 == pytest.approx(0.5)
    assert scores.macro_f1 == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert scores.per_label["neutral"].support == 4


def test_a_label_that_is_never_found_scores_zero() -> None:
    scores = score(one_hot([1, 1]), np.array([0, 1]), NAMES)
    assert scores.per_label["negative"].f1 == 0
    assert scores.per_label["positive"].recall == 0


def test_macro_recall_does_not_reward_the_mix_of_labels() -> None:
    truth = np.array([1] * 98 + [0, 2])
    scores = score(one_hot([1] * 100), truth, NAMES)
    assert scores.accuracy == pytest.approx(0.98)
    assert scores.macro_recall == pytest.approx(1 / 3)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    probabilities = np.tile(np.array([[0.8, 0.1, 0.1]], dtype=np.float32), (10, 1))
    truth = np.array([0] * 6 + [1] * 4)
    assert calibration_error(probabilities, truth) == pytest.approx(0.2, abs=1e-6)
    assert calibration_error(one_hot([0, 1]), np.array([0, 1])) == 0


@settings(max_examples=30)
@given(temperature=st.floats(0.3, 4.0), seed=st.integers(0, 20))
def test_the_temperature_that_made_the_labels_is_found(temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4000, 3)).astype(np.float32)
    chances = softmax((logits / temperature).astype(np.float32))
    truth = (rng.random((4000, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(temperature, rel=0.15)
    best = negative_log_likelihood(logits, truth, found)
    assert best <= min(negative_log_likelihood(logits, truth, found * factor) for factor in (0.9, 1.1))
