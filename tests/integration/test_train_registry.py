"""The registry on real MLflow: SQLite and a folder, the default bundle, and MLflow's own server on top."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console

from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, load_bundle, write_bundle
from overtone.cli.models import prune
from overtone.cli.rollout import Rollout, save_rollout
from overtone.engine import classify_sorted, open_engine
from overtone.errors import ConfigurationError, EnvironmentProblemError, NotFoundError, UnavailableError
from overtone.registry import Registry, is_in_use, tracking_uri
from overtone.settings import Settings, load_settings
from train.config import AblationStep, TrainConfig
from train.tracking import ablation, tracked_run

pytestmark = [
    pytest.mark.timeout(300),
    # What MLflow and the libraries under it say of each other.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("mlflow_as_before"),
]

CONFIG = TrainConfig(name="moods")


def variant(folder: Path, temperature: float) -> Bundle:
    """The default bundle with another temperature: another version, with golden scores of its own."""
    original = load_bundle()
    shutil.copytree(original.path, folder)
    spec = BundleSpec(
        name="moods",
        labels=original.labels,
        max_length=original.max_length,
        temperature=temperature,
        precision=original.precision,
        golden=original.golden,
        metrics={"validation": {"macro_recall": 0.75, "ece": 0.03}, "data": {"train_sha256": "ab" * 32}},
    )
    draft = write_bundle(folder, spec=spec)
    engine = open_engine(draft)
    scores = classify_sorted(engine, TextEncoder(draft).encode([one.text for one in draft.golden]))
    engine.close()
    golden = tuple(Golden(one.text, tuple(map(float, row))) for one, row in zip(draft.golden, scores, strict=True))
    return write_bundle(folder, spec=replace(spec, golden=golden))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings(overtone_home=tmp_path_factory.mktemp("home"), mlflow_tracking_uri=None, wandb_api_key=None)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [variant(folder / f"b{number}", 1.1 + number / 10) for number in range(2)]


@pytest.fixture(scope="module")
def registry(settings: Settings, bundles: list[Bundle]) -> Registry:
    """Two runs, each with its bundle registered as challenger."""
    assert not is_in_use(settings)
    for number, bundle in enumerate(bundles):
        with tracked_run(settings, CONFIG, f"run-{number}") as tracker:
            for step in (1, 2):
                tracker.metrics({"step": step, "macro_recall": 0.5 + step / 10, "device": "cpu"}, step)
            registered = tracker.bundle(bundle.path, as_challenger=True)
            assert registered is not None
            assert registered.version == str(number + 1)
    return Registry(settings)


def client(settings: Settings) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri(settings))


def test_a_run_keeps_parameters_metrics_commit_and_bundle(settings: Settings, registry: Registry) -> None:
    mlflow = client(settings)
    run = mlflow.get_run(registry.resolve("1").run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith((settings.home / "mlflow" / "artifacts").as_uri())
    assert run.data.params["optimiser.learning_rate"] == "8e-05"
    assert run.data.metrics["macro_recall"] == pytest.approx(0.7)
    assert len(run.data.tags["git_commit"].removesuffix("-dirty")) == 40


def test_the_newest_bundle_is_the_challenger(registry: Registry, bundles: list[Bundle]) -> None:
    found = registry.resolve("challenger")
    assert (found.version, found.bundle_version) == ("2", bundles[1].version)
    assert registry.resolve(bundles[0].version).aliases == ()
    assert found.tags["validation_macro_recall"] == "0.7500"
    assert [one.version for one in registry.history()] == ["2", "1"]
    with pytest.raises(NotFoundError, match="no version champion"):
        registry.resolve("champion")


def test_a_fetched_bundle_is_the_one_that_was_registered(
    settings: Settings, registry: Registry, bundles: list[Bundle]
) -> None:
    fetched = registry.fetch(registry.resolve("1"))
    assert fetched.path == settings.home / "bundles" / bundles[0].version
    assert fetched.sha256 == bundles[0].sha256
    assert registry.fetch(registry.resolve("1")).path == fetched.path
    assert not list(fetched.path.parent.glob(".fetch-*"))


def test_aliases_follow_what_is_served(registry: Registry, bundles: list[Bundle]) -> None:
    first, second = (bundle.version for bundle in bundles)
    registry.follow(first, None)
    assert registry.resolve("champion").bundle_version == first
    assert registry.resolve("challenger").bundle_version == second
    registry.follow(second, first)
    assert registry.resolve("champion").bundle_version == second
    assert registry.resolve("previous").bundle_version == first
    assert registry.find("challenger") is None
    assert registry.follow("unknown-00000000", second) is None
    assert registry.find("champion") is None
    assert registry.resolve("previous").bundle_version == second


def test_fetched_bundles_that_nothing_refers_to_are_removed(
    settings: Settings, registry: Registry, bundles: list[Bundle]
) -> None:
    def pruned(home: Settings, **options: Any) -> list[str]:
        console = Console(file=io.StringIO(), width=200)
        assert prune(home, console, as_json=True, **{"keep": 0, "is_dry_run": False} | options) == 0
        found = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
        assert found["bytes"] == sum(one["bytes"] for one in found["removed"])
        assert all(one["bytes"] > 1_000_000 for one in found["removed"])
        return [one["version"] for one in found["removed"]]

    registry.set_alias("champion", registry.resolve("2"))
    first, second = (registry.fetch(registry.resolve(number)).path for number in ("1", "2"))
    other = shutil.copytree(first, first.parent / "not-of-the-registry")

    assert pruned(settings, keep=1) == []
    save_rollout(settings.home, Rollout(champion=str(first)))
    assert pruned(settings) == []
    save_rollout(settings.home, Rollout(champion=str(second), previous=str(first), has_previous=True))
    assert pruned(settings) == []
    save_rollout(settings.home, Rollout())
    assert pruned(settings.model_copy(update={"bundle": first})) == []
    assert pruned(settings, is_dry_run=True) == [bundles[0].version]
    assert first.is_dir()

    assert pruned(settings) == [bundles[0].version]
    assert {path.name for path in first.parent.iterdir()} == {second.name, other.name}
    assert registry.fetch(registry.resolve("1")).sha256 == bundles[0].sha256


def test_nothing_is_removed_that_no_registry_keeps(tmp_path: Path) -> None:
    home = load_settings(overtone_home=tmp_path, mlflow_tracking_uri=None)
    with pytest.raises(NotFoundError, match="no registry"):
        prune(home, Console(), keep=0, is_dry_run=False, as_json=False)


def test_a_run_that_did_not_end_is_continued_under_its_name(settings: Settings, registry: Registry) -> None:
    def fail() -> str:
        with tracked_run(settings, CONFIG, "broken") as tracker:
            tracker.metrics({"loss": 1.0}, 1)
            raise NotFoundError("the worker is gone")
        return ""

    with pytest.raises(NotFoundError):
        fail()
    with tracked_run(settings, CONFIG.model_copy(update={"name": "other"}), "broken") as tracker:
        tracker.metrics({"loss": 0.5}, 2)
        run_id = tracker.run_id
    with tracked_run(settings, CONFIG, "broken") as again:
        assert again.run_id != run_id
    mlflow = client(settings)
    history = mlflow.get_metric_history(run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5)]


def test_a_server_that_is_away_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = load_settings(overtone_home=tmp_path, mlflow_tracking_uri="http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="MLflow: listing versions failed"):
        Registry(away).history()


def test_weights_and_biases_is_asked_for_by_its_key_alone(settings: Settings) -> None:
    with_key = load_settings(overtone_home=settings.home, mlflow_tracking_uri=None, wandb_api_key="k")
    with pytest.raises(EnvironmentProblemError, match="wandb is not installed"), tracked_run(with_key, CONFIG, "w"):
        pass


def test_weights_and_biases_gets_the_same_figures(
    settings: Settings, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Noted:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (values, step)))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    def start(**given: Any) -> Noted:
        calls.append(("init", given))
        return Noted()

    stand_in = ModuleType("wandb")
    stand_in.login = lambda key: calls.append(("login", key))  # type: ignore[attr-defined]
    stand_in.init = start  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with_key = load_settings(
        overtone_home=settings.home, mlflow_tracking_uri=None, wandb_api_key="k", wandb_project="moods"
    )
    with tracked_run(with_key, CONFIG, "both") as tracker:
        tracker.metrics({"step": 7, "loss": 0.5, "device": "cpu"}, 7)
    config = calls[1][1].pop("config")
    assert calls == [
        ("login", "k"),
        ("init", {"project": "moods", "name": "both", "id": "both", "resume": "allow"}),
        ("log", ({"step": 7.0, "loss": 0.5}, 7)),
        ("finish", 0),
    ]
    assert config["optimiser.learning_rate"] == 8e-5
    assert "card.data" not in config


def test_the_card_takes_figures_from_runs_on_record(settings: Settings, registry: Registry) -> None:
    with tracked_run(settings, CONFIG, "measured") as tracker:
        tracker.metrics({"bundle_macro_recall": 0.741}, 3)
    steps = (AblationStep(step="before", macro_recall=0.7), AblationStep(step="after", run="measured"))
    assert ablation(settings, steps) == [
        {"step": "before", "macro_recall": 0.7},
        {"step": "after", "macro_recall": pytest.approx(0.741)},
    ]
    with pytest.raises(ConfigurationError, match="no finished run 'run-0' with a measured bundle"):
        ablation(settings, (AblationStep(step="x", run="run-0"),))


def test_mlflow_serves_a_version_without_this_repository(
    settings: Settings, registry: Registry, bundles: list[Bundle], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{registry.name}/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # MLflow starts `uvicorn` by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    store = tracking_uri(settings)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "MLFLOW_REGISTRY_URI": store, "PATH": path}
    # Away from this folder, so that `overtone` is what the model brings.
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, process_group=0)
    texts = ["I love this so much", "worst day ever"]
    try:
        answer = _post(
            server, f"http://127.0.0.1:{port}/invocations", {"dataframe_records": [{"text": t} for t in texts]}
        )
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    found = answer["predictions"]
    assert [one["label"] for one in found] == ["positive", "negative"]
    engine = open_engine(bundles[0])
    scores = classify_sorted(engine, TextEncoder(bundles[0]).encode(texts))
    served = [[one[label] for label in bundles[0].labels] for one in found]
    np.testing.assert_allclose(served, scores, atol=1e-5)


def _post(server: subprocess.Popen[bytes], url: str, body: dict[str, object]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            answer = httpx.post(url, json=body, timeout=30, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        assert answer.status_code == 200, answer.text
        return dict(answer.json())
    raise AssertionError("MLflow's server did not answer")
