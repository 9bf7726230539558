"""The gate on a real registry: a worse champion, the default bundle against it, and the way back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, load_bundle, write_bundle
from overtone.engine import classify_sorted, open_engine
from overtone.registry import Registry, tracking_uri
from overtone.settings import Settings, environment_for, load_settings
from train.config import TrainConfig
from train.tracking import tracked_run

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("mlflow_as_before"),
]

ROOT = Path(__file__).parents[2]
TEXTS = {
    "positive": ["I love this so much", "best day ever", "what a great win", "so happy and proud of you"],
    "neutral": ["The meeting is at noon", "The train leaves from platform 4", "Council votes on Tuesday"],
    "negative": ["worst service ever", "I hate this so much", "so sad and angry about it", "this is awful"],
}


def biased(folder: Path, offset: float) -> Bundle:
    """The default bundle, with `offset` added to the logit of its second label."""
    folder.mkdir()
    original = load_bundle()
    model = onnx.load(original.model_path)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["unbiased" if name == output else name for name in node.output]
    shift = np.array([0, offset, 0], dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(shift, "offset"))
    model.graph.node.append(helper.make_node("Add", ["unbiased", "offset"], [output]))
    onnx.save(model, folder / "model.onnx")
    (folder / "tokenizer.json").write_bytes(original.tokenizer_path.read_bytes())

    def spec(golden: tuple[Golden, ...]) -> BundleSpec:
        return BundleSpec("moods", original.labels, original.max_length, original.temperature, "int8", golden)

    draft = write_bundle(folder, spec=spec(original.golden))
    engine = open_engine(draft)
    scores = classify_sorted(engine, TextEncoder(draft).encode([one.text for one in draft.golden]))
    golden = tuple(Golden(one.text, tuple(map(float, row))) for one, row in zip(draft.golden, scores, strict=True))
    return write_bundle(folder, spec=spec(golden))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def settings(home: Path) -> Settings:
    return load_settings(overtone_home=home, mlflow_tracking_uri=None, wandb_api_key=None)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> dict[str, Bundle]:
    """`worse` and `better`, registered in that order."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"worse": biased(folder / "worse", 6.0), "better": biased(folder / "better", 0.01)}
    for name, bundle in made.items():
        with tracked_run(settings, TrainConfig(name="moods"), name) as tracker:
            assert tracker.bundle(bundle.path, as_challenger=True)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.tsv"
    rows = [f"{label}\t{text} {number}" for number in range(12) for label, texts in TEXTS.items() for text in texts]
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")
    return path


def run(home: Path, *arguments: str, store: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = environment_for(load_settings(overtone_home=home), LOG_LEVEL="ERROR", LOG_FORMAT="json")
    environment.pop("MLFLOW_TRACKING_URI", None)
    environment |= {"MLFLOW_TRACKING_URI": store} if store else {}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def champion(home: Path) -> Any:
    return json.loads((home / "models.json").read_text())["champion"]


def test_the_challenger_is_promoted_served_and_taken_back(
    settings: Settings, home: Path, bundles: dict[str, Bundle], data: Path
) -> None:
    registry = Registry(settings)
    ordered = run(home, "overtone.cli", "models", "promote", str(registry.fetch(registry.resolve("1")).path))
    assert ordered.returncode == 0, ordered.stderr
    assert "version 1 is the champion" in ordered.stdout
    assert registry.resolve("champion").version == "1"
    assert registry.resolve("challenger").version == "2"

    dry = run(home, "train.gate", "--data", str(data), "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert registry.resolve("champion").version == "1"
    assert "gate" not in registry.resolve("2").tags

    judged = run(home, "train.gate", "--data", str(data), "--json")
    assert judged.returncode == 0, judged.stderr
    decision = json.loads(judged.stdout)
    assert (decision["challenger"], decision["champion"]) == (bundles["better"].version, bundles["worse"].version)
    assert decision["carried_out"]
    assert decision["overall"]["difference"]["low"] > 0
    assert champion(home) == str(home / "bundles" / bundles["better"].version)
    found = registry.resolve("champion")
    assert (found.version, found.tags["gate"]) == ("2", "promoted")
    assert registry.find("challenger") is None
    assert registry.resolve("previous").version == "1"
    (kept,) = decisions(settings, found.run_id)
    assert kept["outcome"] == "promoted"
    assert kept["reasons"] == decision["reasons"]

    back = run(home, "overtone.cli", "models", "rollback")
    assert back.returncode == 0, back.stderr
    assert registry.resolve("champion").version == "1"
    assert registry.resolve("previous").version == "2"
    assert champion(home) == str(home / "bundles" / bundles["worse"].version)


def test_a_worse_challenger_stays_one_with_the_reasons_on_record(
    settings: Settings, home: Path, bundles: dict[str, Bundle], data: Path
) -> None:
    judged = run(home, "train.gate", "--challenger", "1", "--champion", "2", "--data", str(data), "--json")
    assert judged.returncode == 3, judged.stderr
    found = Registry(settings).resolve("1")
    assert found.tags["gate"] == "kept the champion"
    assert "does not lie above" in found.tags["gate_reasons"]
    assert decisions(settings, found.run_id)[-1]["carried_out"] is False


def test_a_pod_that_serves_nothing_names_the_champion_before(
    settings: Settings, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """As after a training run on a cluster: the home is new, the registry is not."""
    registry = Registry(settings)
    registry.follow(bundles["worse"].version, None)
    pod = tmp_path / "pod"
    ordered = run(pod, "overtone.cli", "models", "promote", str(bundles["better"].path), store=tracking_uri(settings))
    assert ordered.returncode == 0, ordered.stderr
    assert registry.resolve("champion").version == "2"
    assert registry.resolve("previous").version == "1"


def test_pull_prints_a_folder_that_can_be_served(home: Path, bundles: dict[str, Bundle]) -> None:
    pulled = run(home, "overtone.cli", "models", "pull", "2")
    assert pulled.returncode == 0, pulled.stderr
    assert load_bundle(Path(pulled.stdout.strip())).version == bundles["better"].version
    assert run(home, "overtone.cli", "models", "pull", "99").returncode == 5


def decisions(settings: Settings, run_id: str) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri(settings))
    files = sorted(one.path for one in client.list_artifacts(run_id, "gate"))
    return [json.loads(Path(client.download_artifacts(run_id, file)).read_text()) for file in files]
