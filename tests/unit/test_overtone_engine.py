"""Engines: what a text is given does not depend on the texts beside it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from overtone.bundle import Bundle, BundleSpec, Golden, load_bundle, write_bundle
from overtone.engine import (
    FakeEngine,
    OnnxEngine,
    Probabilities,
    check_golden,
    classify_sorted,
    open_engine,
    pad,
    plan_batches,
)
from overtone.errors import BundleError, EngineError
from overtone.sessions import PlainRunner, Signature, forbid_saturation, has_slow_products

TEXTS = [[1, 4, 2], [1, 8, 8, 9, 2], [1, 2], [1, 6, 4, 5, 5, 5, 2], [1, 7, 2]]


def test_scores_are_probabilities_in_the_order_given(tiny_bundle: Bundle) -> None:
    scores = open_engine(tiny_bundle).classify(TEXTS)
    assert scores.shape == (5, 3)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-6)
    assert scores.argmax(axis=1).tolist() == [2, 0, 1, 2, 1]


def test_a_batch_gives_what_single_texts_give(tiny_bundle: Bundle) -> None:
    engine = OnnxEngine(tiny_bundle)
    singles = np.concatenate([engine.classify([ids]) for ids in TEXTS])
    np.testing.assert_allclose(engine.classify(TEXTS), singles, atol=1e-6)
    np.testing.assert_allclose(classify_sorted(engine, TEXTS, budget_tokens=7), singles, atol=1e-6)
    np.testing.assert_allclose(engine.classify(TEXTS[::-1]), singles[::-1], atol=1e-6)


def test_threads_may_share_an_engine(tiny_bundle: Bundle) -> None:
    engine = OnnxEngine(tiny_bundle)
    expected = engine.classify(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(engine.classify, [TEXTS] * 50):
            np.testing.assert_array_equal(scores, expected)


class NotedSession:
    """Gives zeros, in half a second by the clock `now`."""

    def __init__(self, name: str, now: list[float], ran: list[str]) -> None:
        self._name, self._now, self._ran = name, now, ran

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self._ran.append(self._name)
        self._now[0] += 0.5
        return [np.zeros((len(feed["input_ids"]), 3), dtype=np.float32)]


def test_more_threads_run_a_text_that_finds_the_engine_idle_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [100.0], list[str]()
    monkeypatch.setattr("overtone.sessions.time.monotonic", lambda: now[0])
    signature = Signature(ids=np.int64, has_mask=True, has_types=False, output="logits", logits=np.float32)
    runner = PlainRunner(NotedSession("narrow", now, ran), signature, NotedSession("wide", now, ran))
    one, two = pad([[1, 2]], np.int64), pad([[1, 2], [1]], np.int64)

    for pause_s, batch in ((0.0, one), (0.2, one), (0.05, one), (0.2, two), (0.2, one)):
        now[0] += pause_s
        runner.run(*batch)

    assert ran == ["wide", "wide", "narrow", "narrow", "wide"]


def test_more_threads_are_for_products_that_take_longer_than_waking_them() -> None:
    with_amx, with_avx2 = frozenset({"amx_int8", "avx2"}), frozenset({"avx2"})
    assert not has_slow_products("int8", with_amx)
    assert has_slow_products("int8", with_avx2)
    assert has_slow_products("int8", None)
    assert has_slow_products("fp32", with_amx)


def test_the_number_of_threads_changes_no_score(tiny_bundle: Bundle) -> None:
    engine = OnnxEngine(tiny_bundle, lone_threads=2)
    expected = OnnxEngine(tiny_bundle).classify(TEXTS)
    for ids, scores in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(engine.classify([ids])[0], scores, atol=1e-6)


def test_sums_of_int8_products_do_not_saturate(tiny_bundle: Bundle, bundle_spec: BundleSpec) -> None:
    # 32 x 255 x 127 is far over 16 bits, at which x86 without VNNI would hold sums of pairs.
    quantised = np.array([[127, -127, 63]] * 32, dtype=np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("ReduceMax", ["rows"], ["whole"], axes=[1], keepdims=0),
            helper.make_node(
                "MatMulIntegerToFloat", ["whole", "weight", "scale", "scale"], ["logits"], domain="com.microsoft"
            ),
        ],
        "int8",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "l"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [
            numpy_helper.from_array(np.full((16, 32), 255, dtype=np.uint8), "table"),
            numpy_helper.from_array(quantised, "weight"),
            numpy_helper.from_array(np.array(1e-3, dtype=np.float32), "scale"),
        ],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), tiny_bundle.model_path)
    logits = 255 * quantised[:1].astype(np.float64) * 32 * 1e-6 / bundle_spec.temperature
    expected = np.exp(logits) / np.exp(logits).sum()
    engine = OnnxEngine(write_bundle(tiny_bundle.path, spec=bundle_spec))
    np.testing.assert_allclose(engine.classify([[1, 2]]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "shifted"),
    [
        (frozenset({"avx2"}), True),
        (frozenset({"avx512f", "avx2"}), True),
        (None, True),
        (frozenset({"avx_vnni", "avx2"}), False),
        (frozenset({"avx512_vnni", "avx512f", "avx2"}), False),
        (frozenset({"amx_int8", "avx512_vnni", "avx2"}), False),
    ],
)
def test_weights_are_shifted_only_where_sums_would_saturate(features: frozenset[str] | None, shifted: bool) -> None:
    options = onnxruntime.SessionOptions()
    forbid_saturation(options, features)
    if shifted:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have configuration"):
            options.get_session_config_entry("session.x64quantprecision")


@pytest.mark.parametrize("token_ids", [[[1, 99, 2]], [[1, -50, 2], [1, 2]]])
def test_ids_outside_the_vocabulary_are_an_engine_error(tiny_bundle: Bundle, token_ids: list[list[int]]) -> None:
    with pytest.raises(EngineError, match="batch of"):
        OnnxEngine(tiny_bundle).classify(token_ids)


def test_a_closed_engine_says_so(tiny_bundle: Bundle) -> None:
    engine = OnnxEngine(tiny_bundle)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.classify(TEXTS)


def test_a_file_that_is_no_model_is_refused(tiny_bundle: Bundle, bundle_spec: BundleSpec) -> None:
    tiny_bundle.model_path.write_bytes(b"not a model")
    damaged = write_bundle(tiny_bundle.path, spec=bundle_spec)
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        OnnxEngine(damaged)


def test_a_model_with_other_inputs_is_refused(tiny_bundle: Bundle, bundle_spec: BundleSpec) -> None:
    onnx.save(_identity("pixels"), tiny_bundle.model_path)
    with pytest.raises(BundleError, match="pixels"):
        OnnxEngine(write_bundle(tiny_bundle.path, spec=bundle_spec))


def test_a_model_with_another_number_of_labels_is_refused(tiny_bundle: Bundle, bundle_spec: BundleSpec) -> None:
    spec = replace(bundle_spec, labels=("bad", "good"), golden=(Golden("love", (0.2, 0.8)),))
    with pytest.raises(BundleError, match="2 labels"):
        OnnxEngine(write_bundle(tiny_bundle.path, spec=spec))


def test_golden_texts_are_checked(tiny_bundle: Bundle, bundle_spec: BundleSpec) -> None:
    check_golden(tiny_bundle, OnnxEngine(tiny_bundle))
    wrong = write_bundle(tiny_bundle.path, spec=bundle_spec)
    with pytest.raises(BundleError, match="golden text 0"):
        check_golden(wrong, OnnxEngine(wrong))


def test_golden_texts_are_not_passed_by_numbers_that_are_none(tiny_bundle: Bundle) -> None:
    class Broken(FakeEngine):
        def classify(self, token_ids: list[list[int]]) -> Probabilities:
            return np.full((len(token_ids), self.labels), np.nan, dtype=np.float32)

    with pytest.raises(BundleError, match="golden text"):
        check_golden(load_bundle(tiny_bundle.path), Broken())


@given(st.lists(st.lists(st.integers(0, 30_000), min_size=1, max_size=40), min_size=1, max_size=20))
def test_padding_keeps_every_id_and_marks_it(token_ids: list[list[int]]) -> None:
    ids, mask = pad(token_ids, np.int64)
    assert ids.shape == mask.shape == (len(token_ids), max(map(len, token_ids)))
    assert [row[: sum(kept)] for row, kept in zip(ids.tolist(), mask.tolist(), strict=True)] == token_ids
    assert not ids[mask == 0].any()


@given(st.lists(st.integers(1, 128), max_size=200), st.integers(1, 600))
def test_batches_hold_each_row_once_within_the_budget(lengths: list[int], budget_tokens: int) -> None:
    batches = plan_batches(lengths, budget_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget_tokens


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=30), st.integers(1, 40))
def test_sorting_changes_no_result(token_ids: list[list[int]], budget_tokens: int) -> None:
    engine = FakeEngine()
    np.testing.assert_array_equal(classify_sorted(engine, token_ids, budget_tokens), engine.classify(token_ids))


def test_no_texts_are_no_scores() -> None:
    assert classify_sorted(FakeEngine(), []).shape == (0, 3)


def test_the_fake_engine_fails_on_request_and_takes_its_time() -> None:
    engine = FakeEngine(delay_s=1e-5, fail_on=13)
    assert engine.classify([[1, 2]]).shape == (1, 3)
    with pytest.raises(EngineError):
        engine.classify([[1, 2], [13]])


def _identity(name: str) -> onnx.ModelProto:
    def info(label: str) -> Sequence[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(label, TensorProto.FLOAT, ["n", 3])]

    graph = helper.make_graph([helper.make_node("Identity", [name], ["logits"])], "g", info(name), info("logits"))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
