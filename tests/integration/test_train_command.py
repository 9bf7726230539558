"""`python -m train` end to end: a tiny encoder, a made-up language of three moods, real Ray Train, a real bundle."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.cli.processes import MARK, mark_of, marked_processes
from overtone.engine import check_golden, classify_sorted, open_engine
from overtone.hardware import usable_cores
from overtone.registry import Registry
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
            "name": "encoder",
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


def run_train(workshop: Path, *extra: str, with_output: bool = True) -> subprocess.CompletedProcess[str]:
    arguments: dict[str, Path | str] = {
        "--config": workshop / "moods.yaml",
        "--train": workshop / "train.tsv",
        "--validation": workshop / "validation.tsv",
        "--storage": "runs",
        "--run-name": "first",
    } | ({"--output": workshop / "bundle"} if with_output else {})
    command = [sys.executable, "-m", "train", *(str(part) for pair in arguments.items() for part in pair), *extra]
    home = str(workshop / "home")
    environment = environment_for(load_settings(), OVERTONE_HOME=home, HOME=home, LOG_FORMAT="json")
    environment[MARK] = mark_of(workshop / "home", "test", "train")
    # As on a cluster where replicas run too.
    environment["OMP_NUM_THREADS"] = "1"
    # Folders that are not absolute are those of whoever started the run, whatever folder its workers are in.
    return subprocess.run(
        command, cwd=workshop, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def trained(workshop: Path) -> str:
    """What a run that is over said."""
    ended = run_train(workshop)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert marked_processes(workshop / "home") == []
    return ended.stderr


def test_texts_in_a_bundle_out(workshop: Path, trained: str) -> None:
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
    assert f"1 x {usable_cores()} CPU threads" in card
    assert "python -m train --config" in card
    assert "validation: macro-averaged recall" in trained
    assert not (workshop / "home" / ".ray").exists(), "Ray's token was left in the home folder"

    evaluate = [sys.executable, "-m", "train.evaluate", "--bundle", str(bundle.path), "--json"]
    printed = subprocess.run(
        [*evaluate, "--data", str(workshop / "validation.tsv")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(printed.stdout)
    assert found["model_version"] == bundle.version
    assert found["macro_recall"] == pytest.approx(bundle.metrics["validation"]["macro_recall"])

    assert_on_record(workshop / "home", bundle)


@pytest.mark.usefixtures("trained")
def test_checkpoints_are_averaged_and_a_finished_run_is_not_trained_again(workshop: Path) -> None:
    bundle = load_bundle(workshop / "bundle")
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

    earlier = workshop / "runs" / "earlier"
    earlier.mkdir()
    (earlier / "ended.txt").touch()
    os.utime(earlier / "ended.txt", (0, 0))
    again = run_train(workshop, "--register", "--keep-runs=1", with_output=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step 38/" not in again.stderr, "a finished run was trained again"
    assert "removed the checkpoints of run earlier" in again.stderr
    assert [path.name for path in (workshop / "runs").iterdir()] == ["first"]
    registry = Registry(load_settings(overtone_home=workshop / "home"))
    assert registry.resolve("challenger").bundle_version == bundle.version


def assert_on_record(home: Path, bundle: Bundle) -> None:
    """The run in MLflow has its data, its figures and its report."""
    import mlflow

    store = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    client = mlflow.MlflowClient(store, store)
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.tags["snapshot_sha256"] == bundle.metrics["data"]["snapshot"]
    assert (home / "snapshots" / run.data.tags["snapshot_sha256"] / "train.parquet").is_file()
    measured = bundle.metrics["validation"]
    assert run.data.metrics["bundle_macro_recall"] == pytest.approx(measured["macro_recall"])
    assert run.data.metrics["bundle_ece"] == pytest.approx(measured["ece"])
    assert run.data.metrics["tokens_per_s"] > run.data.metrics["texts_per_s"] > 0
    kept = {Path(one.path).name for one in client.list_artifacts(run.info.run_id, "report")}
    assert {"index.html", "confusion.png", "calibration.png", "slices.png", "robustness.png"} <= kept


FLAWED = {
    "wrong labels": (b"happy\tfine", "label 'happy' is not one of negative, neutral, positive (line 62)"),
    "empty texts": (b"positive\t  ", "the text is empty (line 62)"),
    "not UTF-8": (b"positive\tcaf\xe9", "not UTF-8 (line 62)"),
    "leaked": (None, "60 rows: the same text is in validation (lines 2, 3, 4, 5, 6 and 55 more)"),
    "one class": (None, "all 60 rows have the same label"),
}


@pytest.mark.parametrize("kind", FLAWED)
def test_data_that_cannot_be_used_stops_before_training_with_a_report(
    workshop: Path, tmp_path: Path, kind: str
) -> None:
    flaw, told = FLAWED[kind]
    lines = (workshop / ("validation.tsv" if kind == "leaked" else "train.tsv")).read_bytes().splitlines()[:61]
    if kind == "one class":
        lines = [b"label\ttext", *(b"neutral\t" + line.split(b"\t")[1] for line in lines[1:])]
    data = tmp_path / "flawed.tsv"
    data.write_bytes(b"\n".join([*lines, *([flaw] if flaw else [])]) + b"\n")
    before = {path for path in workshop.rglob("*") if "flawed" not in path.name}
    ended = run_train(workshop, "--train", str(data), "--run-name", "flawed")
    assert ended.returncode == 1
    assert told in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert "caf" not in ended.stderr
    assert set(workshop.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["--set", "optimiser.epochs=0"], 2, "optimiser.epochs"),
        (["--set", "model.name=minilm", "--train", "nowhere.tsv"], 1, "nowhere.tsv: cannot be read"),
        (["--gate", "nowhere.tsv"], 1, "nowhere.tsv: cannot be read"),
        (["--storage", "nowhere://runs"], 2, "--storage nowhere://runs: "),
        (["--output", "encoder"], 1, "holds something else than a bundle"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(workshop: Path, extra: list[str], code: int, told: str) -> None:
    ended = run_train(workshop, *extra)
    assert ended.returncode == code
    assert told in ended.stderr.replace("\n", " ")
    assert "Traceback" not in ended.stderr
