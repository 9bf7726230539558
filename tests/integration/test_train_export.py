"""What becomes of weights in fp16 and fp32; they are fresh, which changes nothing of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from overtone.bundle import TextEncoder
from overtone.engine import check_golden, classify_sorted, open_engine
from overtone.errors import OvertoneError
from overtone.schema import LABELS
from train.config import ModelConfig, TrainConfig
from train.data import Split, read_split
from train.encoder import open_classifier
from train.export import export_bundle

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

    def weights(self, name: str) -> Path:
        self.classifier.save_pretrained(self.folder / name)
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


def test_a_difference_that_is_not_allowed_is_told(workshop: Workshop, tmp_path: Path) -> None:
    config = workshop.config(precision="fp16", max_fp16_difference=1e-12)
    with pytest.raises(OvertoneError, match=r"max_fp16_difference.*export\.precision=fp32"):
        export_bundle(workshop.weights("weights"), tmp_path / "bundle", config, workshop.split, {})
    assert not (tmp_path / "bundle").exists()
