"""The configuration of training: file, environment, flags."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from overtone.errors import ConfigurationError
from overtone.settings import Settings, load_settings
from train.config import ExportConfig, TrainConfig, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL_NAME", "MAX_LENGTH", "BATCH_SIZE", "LEARNING_RATE", "NUM_EPOCHS"):
        monkeypatch.delenv(name, raising=False)
    return load_settings()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


POLICIES = {"gate.yaml", "retrain.yaml"}
RUNS = [path for path in sorted((ROOT / "configs" / "train").glob("*.yaml")) if path.name not in POLICIES]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_the_files_we_ship_are_valid(path: Path, settings: Settings) -> None:
    assert load_config(path, settings).name == path.stem


def test_environment_wins_over_the_file_and_flags_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "name: x\noptimiser: {learning_rate: 1.0e-5, epochs: 9, batch_size: 8}\n")
    for name, value in {
        "MODEL_NAME": "some/encoder",
        "MAX_LENGTH": "64",
        "BATCH_SIZE": "16",
        "LEARNING_RATE": "0.001",
        "NUM_EPOCHS": "4",
    }.items():
        monkeypatch.setenv(name, value)
    config = load_config(path, load_settings(), ["optimiser.epochs=5"])
    assert config.model.name == "some/encoder"
    assert config.model.max_length == 64
    assert config.optimiser.batch_size == 16
    assert config.optimiser.learning_rate == 0.001
    assert config.optimiser.epochs == 5


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [("optimiser.learning_rate=8e-5", 8e-5), ("optimiser.learning_rate=1.0e-4", 1e-4), ("optimiser.seed=3", 3)],
)
def test_set_reads_numbers(tmp_path: Path, settings: Settings, assignment: str, expected: float) -> None:
    config = load_config(written(tmp_path, "name: x"), settings, [assignment])
    assert getattr(config.optimiser, assignment.split("=", maxsplit=1)[0].split(".")[1]) == expected


@pytest.mark.parametrize(
    ("text", "assignments", "told"),
    [
        ("name: x\noptimizer: {}", [], "optimizer"),
        ("name: x\noptimiser: {epochs: 0}", [], "optimiser.epochs"),
        ("name: Not A Name", [], "name"),
        ("name: [", [], "not valid YAML"),
        ("- a", [], "mapping"),
        ("name: x", ["epochs"], "--set epochs"),
        ("name: x", ["name.first=1"], "name is a value"),
        ("name: x\ncluster: {workers: 64}", [], "batch_size must be at least"),
        ("name: x\ncluster: {workers: 4, max_workers: 2}", [], "max_workers must be at least"),
        ("name: x\ncluster: {max_workers: 64}", [], "batch_size must be at least"),
        ("name: x\ncluster: {sharding: shard}", ["optimiser.ema_decay=0.9"], "ema_decay does not go with"),
        ("name: x\ncluster: {sharding: shard}", ["optimiser.mixout=0.5"], "mixout does not go with"),
        ("name: x\nmodel: {gradient_checkpointing: true}", ["optimiser.mixout=0.5"], "mixout does not go with"),
        ("name: x\nexport: {precision: fp32}", ["optimiser.quantisation_aware=true"], "precision=int8 alone"),
        ("name: x\nexport: {golden: []}", [], "export.golden"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, settings: Settings, text: str, assignments: list[str], told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        load_config(written(tmp_path, text), settings, assignments)


def test_a_missing_file_is_named(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", settings)


def test_values_survive_the_way_to_a_worker(settings: Settings) -> None:
    config = load_config(ROOT / "configs" / "train" / "tweets.yaml", settings)
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_int8_needs_the_fused_operators() -> None:
    assert ExportConfig(precision="fp16", operators="standard").operators == "standard"
    with pytest.raises(ValidationError, match="precision=int8"):
        ExportConfig(operators="standard")
