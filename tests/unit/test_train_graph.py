"""Changes to an exported graph: same results, and none that depends on the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from overtone.hardware import read_cpu_features
from overtone.sessions import forbid_saturation
from train.calibrate import best_scale, measure_scales
from train.graph import Scale, freeze_scales, pack_rows, quantised_tensors, split_attention

HIDDEN, HEADS, LABELS = 16, 2, 3
IDS = np.array([[3, 4, 5, 6, 7], [8, 9, 2, 0, 0], [1, 0, 0, 0, 0]], dtype=np.int64)
LENGTHS = [5, 3, 1]
MASK = (np.arange(5) < np.array(LENGTHS)[:, None]).astype(np.int64)


@pytest.fixture
def fused() -> onnx.ModelProto:
    dice = np.random.default_rng(5)
    constants = {
        "words": dice.normal(size=(12, HIDDEN)),
        "qkv": dice.normal(size=(HIDDEN, 3 * HIDDEN)) / 4,
        "qkv_bias": dice.normal(size=3 * HIDDEN) / 4,
        "head": dice.normal(size=(HIDDEN, LABELS)),
        "head_bias": dice.normal(size=LABELS),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    tensors += [numpy_helper.from_array(np.array([value]), name) for name, value in (("one", 1), ("first", 0))]
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["x"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32),
        helper.make_node("ReduceSum", ["mask", "one"], ["lengths"], keepdims=0),
        helper.make_node(
            "Attention", ["x", "qkv", "qkv_bias", "lengths"], ["context"], domain="com.microsoft", num_heads=HEADS
        ),
        helper.make_node("Gather", ["context", "first"], ["narrow"], axis=1),
        helper.make_node("Squeeze", ["narrow", "one"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "head"], ["product"], name="product"),
        helper.make_node("Add", ["product", "head_bias"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in INPUTS]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", LABELS])
    graph = helper.make_graph(nodes, "g", inputs, [output], initializer=tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


INPUTS = ("input_ids", "attention_mask")


def test_the_standard_attention_gives_what_the_fused_one_gave(fused: onnx.ModelProto) -> None:
    expected = _run(fused, IDS, MASK)
    assert split_attention(fused) == 1
    np.testing.assert_allclose(_run(fused, IDS, MASK), expected, atol=1e-5)
    assert "qkv" not in {tensor.name for tensor in fused.graph.initializer}


def test_attention_with_another_mask_is_left_alone(fused: onnx.ModelProto) -> None:
    attention = next(node for node in fused.graph.node if node.op_type == "Attention")
    attention.input[3] = "mask"
    assert split_attention(fused) == 0
    assert attention in fused.graph.node


def test_frozen_scales_cost_little_and_make_texts_independent(fused: onnx.ModelProto, tmp_path: Path) -> None:
    split_attention(fused)
    expected = _run(fused, IDS, MASK)
    small = _quantised(fused, tmp_path)
    names = quantised_tensors(small)
    assert names == ["x", "pooled"]
    rows = [row[:length].tolist() for row, length in zip(IDS, LENGTHS, strict=True)]
    freeze_scales(small, measure_scales(small, names, rows))

    kinds = [node.op_type for node in small.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4
    assert kinds.count("QuantizeLinear") == 2
    assert not {"DynamicQuantizeLinear", "MatMulInteger", "Mul", "Add"} & set(kinds)
    together = _run(small, IDS, MASK)
    np.testing.assert_allclose(together, expected, atol=0.15)
    for number, row in enumerate(rows):
        alone = _run(small, np.array([row]), np.ones((1, len(row)), dtype=np.int64))
        np.testing.assert_allclose(alone[0], together[number], atol=1e-6)


@pytest.mark.parametrize("is_small", [False, True])
def test_packed_rows_give_the_same_scores(fused: onnx.ModelProto, tmp_path: Path, is_small: bool) -> None:
    split_attention(fused)
    model = fused
    if is_small:
        model = _quantised(fused, tmp_path)
        rows = [row[:length].tolist() for row, length in zip(IDS, LENGTHS, strict=True)]
        freeze_scales(model, measure_scales(model, quantised_tensors(model), rows))
    expected = _run(model, IDS, MASK)

    assert pack_rows(model) == 1
    np.testing.assert_allclose(_run(model, IDS, MASK), expected, atol=1e-6)
    others = IDS.copy()
    others[MASK == 0] = 11
    np.testing.assert_allclose(_run(model, others, MASK), expected, atol=1e-6)


@pytest.mark.parametrize("is_shared", [False, True])
def test_rows_are_packed_where_a_sum_names_its_constant_first(fused: onnx.ModelProto, is_shared: bool) -> None:
    """As exporters write biases; those of a fresh model are all alike, kept once, and read by an `Identity`."""
    constant = numpy_helper.from_array(np.full(HIDDEN, 0.25, dtype=np.float32), "offset")
    fused.graph.initializer.append(constant)
    name = "shared" if is_shared else "offset"
    attention = next(node for node in fused.graph.node if node.op_type == "Attention")
    place = list(fused.graph.node).index(attention)
    attention.input[0] = "moved"
    fused.graph.node.insert(place, helper.make_node("Add", [name, "x"], ["moved"]))
    if is_shared:
        fused.graph.node.insert(0, helper.make_node("Identity", ["offset"], [name]))
    split_attention(fused)
    expected = _run(fused, IDS, MASK)
    assert pack_rows(fused) == 1
    np.testing.assert_allclose(_run(fused, IDS, MASK), expected, atol=1e-6)
    packed = {output for node in fused.graph.node for output in node.output if output.endswith("_packed")}
    assert "moved_packed" in packed


def test_rows_are_not_packed_around_attention_that_knows_no_lengths(fused: onnx.ModelProto) -> None:
    before = fused.SerializeToString()
    assert pack_rows(fused) == 0
    assert fused.SerializeToString() == before


def test_a_scale_keeps_zero_exact_and_gives_up_a_rare_value() -> None:
    values = np.random.default_rng(1).normal(size=200_000).astype(np.float32)
    whole = best_scale(values)
    assert 0 < whole.zero < 255
    outlier = best_scale(np.append(values, np.float32(7.0)))
    assert outlier.step * (255 - outlier.zero) < 7.0
    assert best_scale(np.zeros(4, dtype=np.float32)) == Scale(float(np.finfo(np.float32).tiny), 0)


def _quantised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.save(model, folder / "full.onnx")
    quantize_dynamic(
        folder / "full.onnx",
        folder / "small.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
    )
    return onnx.load(folder / "small.onnx")


def _run(model: onnx.ModelProto, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    forbid_saturation(options, read_cpu_features())
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
