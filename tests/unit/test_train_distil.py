"""What teachers say of texts, averaged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from overtone.errors import ConfigurationError
from train.config import TeacherConfig, TrainConfig
from train.data import LabelledTexts
from train.distil import lessons, soft_labels

ROWS = LabelledTexts(("a", "b c", "d", "e"), np.array([0, 1, 1, 2]))
TEXTS = ["a fine day", "no", "the meeting is at noon, as it always was and always will be", "a"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, make_tiny_encoder: Callable[..., None]) -> list[Path]:
    folders = [tmp_path_factory.mktemp("teacher") for _ in range(2)]
    for seed, folder in enumerate(folders, start=1):
        make_tiny_encoder(folder, seed, num_labels=3, initializer_range=1.0)
    return folders


def said(folders: list[Path], texts: list[str], tau: float = 0.0) -> np.ndarray:
    teachers = [TeacherConfig(weights=str(folder), prior_tau=tau) for folder in folders]
    return soft_labels(teachers, ROWS, texts, 3, lambda done, total: None)


def test_the_mean_of_all_in_the_order_of_the_texts(teachers: list[Path]) -> None:
    both = said(teachers, TEXTS)

    assert both.shape == (4, 3)
    np.testing.assert_allclose(both.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(both, (said(teachers[:1], TEXTS) + said(teachers[1:], TEXTS)) / 2, rtol=1e-5)
    for index, text in enumerate(TEXTS):
        np.testing.assert_allclose(said(teachers, [text])[0], both[index], rtol=1e-3)


def test_the_prior_that_a_teacher_left_out_comes_back(teachers: list[Path]) -> None:
    plain, adjusted = said(teachers[:1], TEXTS), said(teachers[:1], TEXTS, tau=1.0)

    weighed = plain * np.array([0.25, 0.5, 0.25])
    np.testing.assert_allclose(adjusted, weighed / weighed.sum(axis=1, keepdims=True), rtol=1e-4)


def test_a_teacher_counts_by_its_weight(teachers: list[Path]) -> None:
    configs = [
        TeacherConfig(weights=str(folder), weight=weight) for folder, weight in zip(teachers, (3, 1), strict=True)
    ]
    weighed = soft_labels(configs, ROWS, TEXTS, 3, lambda done, total: None)

    expected = 0.75 * said(teachers[:1], TEXTS) + 0.25 * said(teachers[1:], TEXTS)
    np.testing.assert_allclose(weighed, expected, rtol=1e-5)


def test_progress_is_told_up_to_the_end(teachers: list[Path]) -> None:
    told: list[tuple[int, int]] = []
    configs = [TeacherConfig(weights=str(folder)) for folder in teachers]
    soft_labels(configs, ROWS, TEXTS, 3, lambda done, total: told.append((done, total)))
    assert told[-1] == (8, 8)


def test_a_teacher_that_is_not_there_or_not_of_the_same_labels(teachers: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        said([tmp_path], TEXTS)
    with pytest.raises(ConfigurationError, match="knows 3 labels, the run 2"):
        soft_labels([TeacherConfig(weights=str(teachers[0]))], ROWS, TEXTS, 2, lambda done, total: None)


def test_copies_come_after_the_texts_with_the_labels_that_teachers_give(teachers: list[Path]) -> None:
    train = LabelledTexts(
        ("a fine day http", "no", "the meeting is at noon", "a b c d e"), np.array([0, 1, 1, 2]), "sha"
    )
    said_by = [{"weights": str(folder)} for folder in teachers]
    config = TrainConfig.model_validate(
        {"name": "x", "model": {"precision": "fp32"}, "distillation": {"teachers": said_by, "copies": 3}}
    )
    told: list[tuple[int, int]] = []
    learned, soft = lessons(config, train, lambda done, total: told.append((done, total)))

    assert learned.texts[:4] == train.texts
    assert len(learned.texts) == len(learned.labels) == len(soft) == 16
    assert learned.labels[:4].tolist() == [0, 1, 1, 2]
    np.testing.assert_array_equal(learned.labels[4:], soft[4:].argmax(axis=1))
    np.testing.assert_allclose(soft[:1], said(teachers, ["a fine day"]), rtol=1e-3)
    assert told[-1] == (32, 32)
    again, same = lessons(config, train, lambda done, total: None)
    assert again.texts == learned.texts
    np.testing.assert_array_equal(same, soft)


def test_without_copies_the_texts_are_those_of_training(teachers: list[Path]) -> None:
    config = TrainConfig.model_validate({"name": "x", "distillation": {"teachers": [{"weights": str(teachers[0])}]}})
    learned, soft = lessons(config, ROWS, lambda done, total: None)
    assert learned.texts == ROWS.texts
    assert learned.labels.tolist() == ROWS.labels.tolist()
    assert soft.shape == (4, 3)
