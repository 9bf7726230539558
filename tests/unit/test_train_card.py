"""The part of the model card that says what each step of training was worth."""

from pathlib import Path

import pytest

from overtone.bundle import DEFAULT_BUNDLE
from overtone.errors import ConfigurationError
from overtone.settings import load_settings
from train.card import _ablation, _training
from train.config import TrainConfig, load_config
from train.tracking import ablation

CONFIG = Path(__file__).parents[2] / "configs" / "train" / "tweets.yaml"


def test_the_table_says_what_each_step_adds() -> None:
    config = TrainConfig.model_validate({"name": "moods", "card": {"ablation_note": " Of three runs. "}})
    steps = [{"step": "plain", "macro_recall": 0.7}, {"step": "taught", "macro_recall": 0.7251}]
    (section,) = _ablation({"ablation": steps}, config)
    assert section.splitlines() == [
        "## What each step is worth",
        "",
        "Of three runs.",
        "",
        "| step | macro-averaged recall | against the row above |",
        "| --- | --- | --- |",
        "| plain | 0.700 |  |",
        "| taught | 0.725 | +0.025 |",
    ]
    assert _ablation({}, config) == []


def test_the_card_of_the_default_bundle_shows_the_steps_of_its_configuration() -> None:
    settings = load_settings(model_name=None)
    config = load_config(CONFIG, settings)
    (section,) = _ablation({"ablation": ablation(settings, config.card.ablation)}, config)
    assert section in (DEFAULT_BUNDLE / "README.md").read_text(encoding="utf-8")


def test_a_run_that_is_not_on_record_is_named_and_no_store_is_made(tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"name": "moods", "card": {"ablation": [{"step": "plain", "run": "r1"}]}})
    settings = load_settings(overtone_home=tmp_path, mlflow_tracking_uri=None)
    with pytest.raises(ConfigurationError, match="no finished run 'r1'"):
        ablation(settings, config.card.ablation)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [{"step": "x"}, {"step": "x", "run": "r", "macro_recall": 0.5}])
def test_a_step_has_one_source_of_its_figure(step: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="either run or macro_recall"):
        TrainConfig.model_validate({"name": "moods", "card": {"ablation": [step]}})


def test_what_was_learned_from_is_named_where_it_is_used() -> None:
    values = {
        "name": "moods",
        "optimiser": {"rdrop": 0.5},
        "distillation": {"teachers": [{"weights": "a"}, {"weights": "b"}], "weight": 0.9, "copies": 3},
    }
    said = _training({}, TrainConfig.model_validate(values), "train")
    assert "R-Drop 0.5, seed 0" in said
    assert "90% of the loss against the mean probabilities of 2 teachers, over the texts and 3 altered copies" in said
    plain = _training({}, TrainConfig.model_validate({"name": "moods"}), "train")
    assert "R-Drop" not in plain
    assert "teachers" not in plain
