"""What becomes of weights in fp16 and fp32; they are fresh, which changes nothing of it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from overtone.bundle import TextEncoder
from overtone.engine import check_golden, classify_sorted, open_engine
from overtone.errors import OvertoneError
from overtone.schema import LABELS
from overtone.torch_engine import Target, TorchEngine
from train.config import ModelConfig, TrainConfig
from train.data import Split, read_split
from train.encoder import open_classifier
from train.export import export_bundle
from train.torch_form import torch_form_of

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore::UserWarning")]


class Workshop:
    """Weights and texts to export from."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.model = ModelConfig(name=str(folder / "encoder"), max_length=32, pooling="mean")
        self.split: Split = read_split(folder / "train.tsv", folder / "validation.tsv", LABELS)
        self.classifier = open_classifier(self.model, LABELS)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")

    def config(self, **export: object) -> TrainConfig:
        return TrainConfig.model_validate({"name": "moods", "model": self.model, "export": export})

    def weights(self, name: str, *, noise: float = 0.0) -> Path:
        """Their folder. Fresh biases and norms are all alike, which those of a trained model never are: see `noise`."""
        import torch

        model = copy.deepcopy(self.classifier)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * noise)
        model.save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_moods: Callable[[Path, int], None]) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    make_moods(folder, 60)
    return Workshop(folder)


@pytest.mark.parametrize("operators", ["fused", "standard"])
def test_fp16_is_half_as_large_and_gives_the_same_scores(workshop: Workshop, operators: str, tmp_path: Path) -> None:
    weights = workshop.weights("weights")
    half, full = (
        export_bundle(
            weights,
            tmp_path / precision,
            workshop.config(precision=precision, operators=operators),
            workshop.split,
            {},
        ).bundle
        for precision in ("fp16", "fp32")
    )
    assert (half.precision, full.precision) == ("fp16", "fp32")
    assert half.model_path.stat().st_size < 0.6 * full.model_path.stat().st_size
    engine, reference = open_engine(half), open_engine(full)
    check_golden(half, engine)
    encoded = TextEncoder(half).encode(workshop.split.validation.texts)
    together, alone = classify_sorted(engine, encoded), np.concatenate([engine.classify([ids]) for ids in encoded])
    np.testing.assert_allclose(together, classify_sorted(reference, encoded), atol=0.01)
    np.testing.assert_allclose(together, alone, atol=0.01)

    model = onnx.load(half.model_path)
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert not any(one.data_type == onnx.TensorProto.FLOAT for one in model.graph.initializer)
    domains = {node.domain for node in model.graph.node}
    assert domains == ({"", "com.microsoft"} if operators == "fused" else {""})


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_torch_weights_give_what_the_fp32_graph_gives(workshop: Workshop, precision: str, tmp_path: Path) -> None:
    weights, output = workshop.weights("varied", noise=0.1), tmp_path / "bundle"
    config = workshop.config(precision=precision, torch=True, max_int8_loss=1.0, prior_offset=0.5)
    bundle = export_bundle(weights, output, config, workshop.split, {}).bundle
    assert bundle.torch is not None
    assert {"torch/config.json", "torch/model.safetensors"} <= bundle.sha256.keys()
    assert bundle.metrics["torch"]["parity"] <= config.export.max_parity_difference
    assert bundle.metrics["torch"]["temperature"] == bundle.torch.temperature
    engine = open_engine(bundle, wanted="torch")
    check_golden(bundle, engine)

    graph = export_bundle(
        weights, tmp_path / "fp32", workshop.config(precision="fp32", prior_offset=0.5), workshop.split, {}
    ).bundle
    encoded = TextEncoder(bundle).encode(workshop.split.validation.texts)
    expected = np.log(classify_sorted(open_engine(replace(graph, temperature=1.0)), encoded))
    on_torch = replace(bundle, torch=bundle.torch.model_copy(update={"temperature": 1.0}))
    exact = Target("cpu", "fp32", varlen=False, reason="a test")
    np.testing.assert_allclose(np.log(TorchEngine(on_torch, target=exact).classify(encoded)), expected, atol=1e-4)
    assert bundle.torch.temperature == pytest.approx(graph.temperature, abs=1e-3)

    again = export_bundle(weights, output, workshop.config(precision="fp32"), workshop.split, {}).bundle
    assert again.torch is None
    assert not (output / "torch").exists()


def test_torch_weights_that_differ_are_told(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skewed(model: Any, golden: Any) -> Any:
        form, weights = torch_form_of(model, golden)
        return form, {**weights, "layers.0.up.bias": weights["layers.0.up.bias"] + 1}

    monkeypatch.setattr("train.export.torch_form_of", skewed)
    config = workshop.config(precision="fp32", torch=True)
    with pytest.raises(OvertoneError, match=r"torch weights.*max_parity_difference.*export\.torch=false"):
        export_bundle(workshop.weights("weights"), tmp_path / "bundle", config, workshop.split, {})
    assert not (tmp_path / "bundle").exists()


def test_a_difference_that_is_not_allowed_is_told(workshop: Workshop, tmp_path: Path) -> None:
    config = workshop.config(precision="fp16", max_fp16_difference=1e-12)
    with pytest.raises(OvertoneError, match=r"max_fp16_difference.*export\.precision=fp32"):
        export_bundle(workshop.weights("weights"), tmp_path / "bundle", config, workshop.split, {})
    assert not (tmp_path / "bundle").exists()
