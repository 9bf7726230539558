"""`python -m train` end to end: a tiny encoder, a made-up language of three moods, real Ray Train, a real bundle."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from overtone.bundle import TextEncoder, load_bundle
from overtone.engine import check_golden, classify_sorted, open_engine
from overtone.settings import environment_for, load_settings

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_moods: Callable[[Path, int], None]) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_moods(folder, 600)
    config = {
        "name": "moods",
        "model": {
            "name": str(folder / "encoder"),
            "max_length": 32,
            "dropout": 0.0,
            "precision": "fp32",
            "pooling": "mean",
        },
        "optimiser": {
            "epochs": 3,
            "batch_size": 16,
            "learning_rate": 5e-3,
            "prior_tau": 1.0,
            "ema_decay": 0.5,
            "evaluations": 2,
        },
        "export": {"max_int8_loss": 0.05},
    }
    (folder / "moods.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_train(workshop: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    arguments = {
        "--config": workshop / "moods.yaml",
        "--train": workshop / "train.tsv",
        "--validation": workshop / "validation.tsv",
        "--output": workshop / "bundle",
        "--storage": workshop / "runs",
        "--run-name": "first",
    }
    command = [sys.executable, "-m", "train", *(str(part) for pair in arguments.items() for part in pair), *extra]
    home = str(workshop / "home")
    environment = environment_for(load_settings(), OVERTONE_HOME=home, HOME=home, LOG_FORMAT="json")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def ray_processes() -> set[int]:
    return {one.pid for one in psutil.process_iter(["name"]) if one.info["name"] in {"raylet", "gcs_server"}}


def test_texts_in_a_bundle_out(workshop: Path) -> None:
    before = ray_processes()
    ended = run_train(workshop)
    assert ended.returncode == 0, ended.stderr[-3000:]

    bundle = load_bundle(workshop / "bundle")
    assert bundle.name == "moods"
    assert bundle.precision == "int8"
    assert bundle.metrics["validation"]["macro_recall"] > 0.9
    assert bundle.metrics["data"]["train"] == {"negative": 200, "neutral": 200, "positive": 200}
    engine = open_engine(bundle)
    check_golden(bundle, engine)
    texts = ["love great happy", "awful worst", "monday paper"]
    scores = classify_sorted(engine, TextEncoder(bundle).encode(texts))
    assert [bundle.labels[row.argmax()] for row in scores] == ["positive", "negative", "neutral"]

    card = (workshop / "bundle" / "README.md").read_text()
    assert bundle.version in card
    assert "python -m train --config" in card
    assert "validation: macro-averaged recall" in ended.stderr
    assert ray_processes() <= before, "Ray was left running"
    assert not (workshop / "home" / ".ray").exists(), "Ray's token was left in the home folder"

    evaluate = [sys.executable, "-m", "train.evaluate", "--bundle", str(bundle.path), "--json"]
    printed = subprocess.run(
        [*evaluate, "--data", str(workshop / "validation.tsv")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(printed.stdout)
    assert found["model_version"] == bundle.version
    assert found["macro_recall"] == pytest.approx(bundle.metrics["validation"]["macro_recall"])

    weights = sorted(str(folder) for folder in (workshop / "runs").rglob("weights"))
    assert len(weights) == 2, "the best checkpoint and the last are kept"
    data = ["--train", str(workshop / "train.tsv"), "--validation", str(workshop / "validation.tsv")]
    extra = ["--output", str(workshop / "mean"), "--set", "export.prior_offset=0.5"]
    averaged = subprocess.run(
        [sys.executable, "-m", "train.average", "--config", str(workshop / "moods.yaml"), *data, *extra, *weights],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert averaged.returncode == 0, averaged.stderr[-3000:]
    assert load_bundle(workshop / "mean").metrics["validation"]["macro_recall"] > 0.9

    again = run_train(workshop)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step 38/" not in again.stderr, "a finished run was trained again"
    assert load_bundle(workshop / "bundle").version == bundle.version


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["--set", "optimiser.epochs=0"], 2, "optimiser.epochs"),
        (["--set", "model.name=minilm", "--train", "nowhere.tsv"], 1, "nowhere.tsv: cannot be read"),
        (["--output", "docs"], 1, "holds something else than a bundle"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(workshop: Path, extra: list[str], code: int, told: str) -> None:
    ended = run_train(workshop, *extra)
    assert ended.returncode == code
    assert told in ended.stderr.replace("\n", " ")
    assert "Traceback" not in ended.stderr
