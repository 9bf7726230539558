"""A bundle small enough to be made afresh for every test that asks for one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, write_bundle
from overtone.engine import OnnxEngine
from overtone.schema import LABELS

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "love", "great", "fine", "okay", "hate", "worst", "@user", "http")
_WEIGHTS = {"love": (-2, 0, 2), "great": (-2, 0, 2), "fine": (0, 1, 0), "hate": (2, 0, -2), "worst": (2, 0, -2)}

SPEC = BundleSpec(
    name="tiny",
    labels=LABELS,
    max_length=8,
    temperature=2.0,
    precision="fp32",
    golden=(Golden("love", (0.1, 0.2, 0.7)),),
    metrics={"macro_recall": 0.5},
    base_model="none",
    license="Apache-2.0",
)


@pytest.fixture
def bundle_files(tmp_path: Path) -> Path:
    """A folder with the model and the tokenizer of a bag-of-words classifier, and no manifest yet."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    onnx.save(_bag_of_words(), folder / "model.onnx")
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def bundle_spec() -> BundleSpec:
    """The spec that fits `bundle_files`; its golden scores are not the model's."""
    return SPEC


@pytest.fixture
def tiny_bundle(bundle_files: Path) -> Bundle:
    """A bundle that loads and whose golden scores are true."""
    draft = write_bundle(bundle_files, spec=SPEC)
    texts = ("love", "fine", "the worst @someone")
    scores = OnnxEngine(draft).classify(TextEncoder(draft).encode(texts))
    golden = tuple(Golden(text, tuple(map(float, row))) for text, row in zip(texts, scores, strict=True))
    return write_bundle(bundle_files, spec=replace(SPEC, golden=golden))


def _bag_of_words() -> onnx.ModelProto:
    """Logits: the sum of a weight a word, taken over the words that the mask keeps."""
    table = np.array([_WEIGHTS.get(word, (0, 0.5, 0)) for word in WORDS], dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "bag_of_words",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "l"]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(LABELS)])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "middle"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer
