"""The engine on torch: the scores of the model it was made from, whatever lies beside a text.

No GPU is needed: one-kernel attention has a stand-in that does the same row by row, and graphs one that does their work
again with the tensors they were captured with.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import transformers  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from overtone import torch_engine  # noqa: E402
from overtone.bundle import Bundle, TextEncoder, load_bundle, probabilities, write_bundle  # noqa: E402
from overtone.engine import OnnxEngine, check_golden, classify_sorted, open_engine  # noqa: E402
from overtone.errors import BundleError, ConfigurationError, EngineError, OvertoneError  # noqa: E402
from overtone.packed import PackedBucket, pack  # noqa: E402
from overtone.torch_engine import Target, TorchEngine, choose_target, usable_target  # noqa: E402
from train.pooling import classifier_class  # noqa: E402
from train.torch_form import torch_form_of, write_torch_form  # noqa: E402

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
TEXTS = [[1, 4, 2], [1, 8, 8, 9, 2], [1, 2], [1, 6, 4, 5, 5, 5, 2], [1, 7, 2]]
FP32 = Target("cpu", "fp32", varlen=False, reason="a test")
BUCKETS = (PackedBucket(8, 2), PackedBucket(32, 4))


def classifier(kind: str = "Bert", **changes: Any) -> Any:
    torch.manual_seed(0)
    shape = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
    model = classifier_class(shape)
    found = model.from_config(shape) if hasattr(model, "from_config") else model(shape)
    with torch.no_grad():
        for parameter in found.parameters():
            # Large enough that a wrong layer shows in the scores; biases and norms are no longer 0 and 1.
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return found.eval()


def scores_of(model: Any, token_ids: Sequence[Sequence[int]], temperature: float = 1.0) -> Any:
    """What Hugging Face gives each text alone."""
    with torch.inference_mode():
        rows = [torch.tensor([ids]) for ids in token_ids]
        logits = np.concatenate([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows])
    return probabilities(logits, temperature)


def with_torch_form(bundle: Bundle, model: Any, temperature: float = 1.0) -> Bundle:
    """`bundle` with the torch form of `model`, which is another model than that of its graph."""
    texts = TextEncoder(bundle).encode([golden.text for golden in bundle.golden])
    golden = tuple(tuple(map(float, row)) for row in scores_of(model, texts, temperature))
    form, weights = torch_form_of(model, golden)
    write_torch_form(bundle.path, form.model_copy(update={"temperature": temperature}), weights)
    return write_bundle(bundle.path, spec=bundle.spec)


@pytest.fixture
def torch_bundle(tiny_bundle: Bundle) -> Bundle:
    return with_torch_form(tiny_bundle, classifier(), temperature=1.5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Bert", {}),
        ("Bert", {"pooling": "mean"}),
        ("Bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
        ("Bert", {"hidden_act": "relu", "num_attention_heads": 8}),
        ("Roberta", {"pad_token_id": 3}),
        ("Roberta", {"pad_token_id": 3, "pooling": "mean"}),
        ("XLMRoberta", {"pad_token_id": 3}),
        ("Camembert", {"pad_token_id": 3}),
        ("Electra", {"embedding_size": 8}),
        ("Electra", {"embedding_size": 16, "pooling": "mean"}),
        ("DistilBert", {"hidden_dim": 24}),
        ("DistilBert", {"hidden_dim": 24, "pooling": "mean", "sinusoidal_pos_embds": True}),
    ],
)
def test_every_architecture_gives_what_hugging_face_gives(
    tiny_bundle: Bundle, kind: str, changes: dict[str, Any]
) -> None:
    model = classifier(kind, **changes)
    engine = TorchEngine(with_torch_form(tiny_bundle, model), target=FP32)
    expected = np.log(scores_of(model, TEXTS))
    assert np.ptp(expected, axis=0).max() > 0.1
    np.testing.assert_allclose(np.log(engine.classify(TEXTS)), expected, atol=1e-4)


@pytest.mark.parametrize("changes", [{"position_embedding_type": "relative_key"}, {"hidden_act": "silu"}])
def test_what_has_no_torch_form_is_told(changes: dict[str, str]) -> None:
    with pytest.raises(OvertoneError, match=r"type bert .* set export\.torch=false"):
        torch_form_of(classifier(**changes), ((0.2, 0.3, 0.5),))


def test_the_scores_are_calibrated_and_in_the_order_given(torch_bundle: Bundle) -> None:
    engine = TorchEngine(torch_bundle, target=FP32)
    scores = engine.classify(TEXTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, scores_of(classifier(), TEXTS, temperature=1.5), atol=1e-5)
    np.testing.assert_allclose(engine.classify(TEXTS[::-1]), scores[::-1], atol=1e-6)
    assert engine.labels == 3


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), min_size=1, max_size=12))
def test_a_text_is_given_the_same_beside_any_others(shared_engine: TorchEngine, rows: list[list[int]]) -> None:
    alone = np.concatenate([shared_engine.classify([ids]) for ids in rows])
    np.testing.assert_allclose(shared_engine.classify(rows), alone, atol=1e-5)
    np.testing.assert_allclose(classify_sorted(shared_engine, rows, budget_tokens=20), alone, atol=1e-5)


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """An engine for tests that draw many batches."""
    model = classifier(pooling="mean")
    form, weights = torch_form_of(model, ((0.2, 0.3, 0.5),))
    folder = tmp_path_factory.mktemp("shared")
    (folder / "torch").mkdir()
    write_torch_form(folder, form, weights)
    stand_in = replace(load_bundle(), path=folder, max_length=12, torch=form)
    return TorchEngine(stand_in, target=FP32)


def test_threads_may_share_an_engine_and_torch_keeps_its_own_number(torch_bundle: Bundle) -> None:
    before = torch.get_num_threads()
    engine = TorchEngine(torch_bundle, threads=before + 1, target=FP32)
    expected = engine.classify(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(engine.classify, [TEXTS] * 50):
            np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert torch.get_num_threads() == before


def test_golden_texts_are_those_of_the_form(torch_bundle: Bundle) -> None:
    check_golden(torch_bundle, OnnxEngine(torch_bundle))
    check_golden(torch_bundle, TorchEngine(torch_bundle, target=FP32))
    assert torch_bundle.torch is not None
    wrong = torch_bundle.torch.model_copy(update={"golden": tuple(one.scores for one in torch_bundle.golden)})
    write_torch_form(torch_bundle.path, wrong)
    damaged = write_bundle(torch_bundle.path, spec=torch_bundle.spec)
    check_golden(damaged, OnnxEngine(damaged))
    with pytest.raises(BundleError, match="golden text"):
        check_golden(damaged, TorchEngine(damaged, target=FP32))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(tiny_bundle: Bundle, precision: Any) -> None:
    model = classifier(pooling="mean")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    half = TorchEngine(with_torch_form(tiny_bundle, model), target=replace(FP32, precision=precision))
    expected = scores_of(model, TEXTS)
    found = half.classify(TEXTS)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("token_ids", [[[1, 99, 2]], [[1, -1, 2], [1, 2]], [[1] * 17], [[1, 2], []], []])
def test_what_the_tables_do_not_hold_is_an_engine_error(torch_bundle: Bundle, token_ids: list[list[int]]) -> None:
    engine = TorchEngine(torch_bundle, target=FP32)
    with pytest.raises(EngineError, match=f"batch of {len(token_ids)} texts"):
        engine.classify(token_ids)
    assert engine.classify(TEXTS).shape == (5, 3)


def test_numbers_that_are_none_are_an_engine_error(torch_bundle: Bundle) -> None:
    engine = TorchEngine(torch_bundle, target=FP32)
    model = engine._model
    assert model is not None
    with torch.inference_mode():
        model._words = model._words.clone()
        model._words[7] = float("nan")
    assert engine.classify([[1, 4, 2]]).shape == (1, 3)
    with pytest.raises(EngineError, match="no finite number"):
        engine.classify(TEXTS)


def test_a_closed_engine_says_so(torch_bundle: Bundle) -> None:
    engine = TorchEngine(torch_bundle, target=FP32)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.classify(TEXTS)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layers.1.up.weight": None}, r"layers\.1\.up\.weight"),
        ({"layers.1.up.weight": (24, 5)}, "shape"),
        ({"head.last.weight": (2, 16), "head.last.bias": (2,)}, "3 labels"),
        ({"layers.0.out.weight": (5, 16), "layers.0.out.bias": (5,)}, "heads"),
    ],
    ids=["a tensor less", "a wrong width", "a label less", "heads that do not fit"],
)
def test_weights_of_another_shape_are_refused(
    torch_bundle: Bundle, changed: dict[str, tuple[int, ...] | None], reason: str
) -> None:
    from safetensors.torch import load_file

    assert torch_bundle.torch is not None
    weights = {name: one.clone() for name, one in load_file(torch_bundle.torch_weights_path).items()}
    weights |= {name: torch.zeros(shape) for name, shape in changed.items() if shape}
    weights = {name: one for name, one in weights.items() if changed.get(name, ()) is not None}
    write_torch_form(torch_bundle.path, torch_bundle.torch, weights)
    with pytest.raises(BundleError, match=rf"model\.safetensors: .*{reason}"):
        TorchEngine(write_bundle(torch_bundle.path, spec=torch_bundle.spec), target=FP32)


def test_a_file_that_is_no_file_of_tensors_is_refused(torch_bundle: Bundle) -> None:
    torch_bundle.torch_weights_path.write_bytes(b"not tensors")
    with pytest.raises(BundleError, match=r"model\.safetensors: fails on cpu \(SafetensorError"):
        TorchEngine(write_bundle(torch_bundle.path, spec=torch_bundle.spec), target=FP32)


def test_a_bundle_without_a_torch_form_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"export\.torch: true"):
        TorchEngine(tiny_bundle)
    with pytest.raises(BundleError, match=r"export\.torch: true"):
        open_engine(tiny_bundle, wanted="torch")


def test_without_torch_installed_the_extra_is_named(torch_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "find_spec", lambda name: None)
    for refused in (
        lambda: open_engine(torch_bundle, wanted="torch"),
        lambda: TorchEngine(torch_bundle),
        usable_target,
    ):
        with pytest.raises(ConfigurationError, match=r"overtone\[torch\].*ENGINE=auto"):
            refused()


def test_torch_is_taken_when_asked_for_alone(torch_bundle: Bundle) -> None:
    assert isinstance(open_engine(torch_bundle, wanted="torch"), TorchEngine)
    assert isinstance(open_engine(torch_bundle), OnnxEngine)


@pytest.mark.parametrize(
    ("features", "capability", "expected"),
    [
        (None, None, ("cpu", "fp32", False, False)),
        (frozenset({"avx2", "avx512_vnni"}), None, ("cpu", "fp32", False, False)),
        (frozenset({"avx512_bf16"}), None, ("cpu", "bf16", False, False)),
        (frozenset({"amx_bf16", "amx_int8"}), None, ("cpu", "bf16", False, False)),
        (frozenset({"avx512_bf16"}), (9, 0), ("cuda", "bf16", True, True)),
        (None, (8, 0), ("cuda", "bf16", True, True)),
        (None, (7, 5), ("cuda", "fp16", False, False)),
        (None, (6, 1), ("cuda", "fp32", False, False)),
    ],
)
def test_the_target_follows_the_machine(
    features: frozenset[str] | None, capability: tuple[int, int] | None, expected: tuple[str, str, bool, bool]
) -> None:
    target = choose_target(features, capability)
    assert (target.device, target.precision, target.varlen, target.captures) == expected
    assert target.reason


def varlen_attn(query: Any, key: Any, value: Any, starts: Any, _same: Any, longest: int, _too: int) -> Any:
    """What the kernel of that name does on a GPU: rows within themselves; what is in no row is left as it was."""
    assert starts.dtype == torch.int32
    assert query.shape == key.shape == value.shape
    result = torch.full(query.shape, float("nan"), dtype=query.dtype)
    for start, end in pairwise(starts.tolist()):
        assert end - start <= longest
        parts = [one[start:end].transpose(0, 1) for one in (query, key, value)]
        result[start:end] = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
    return result


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target that attends as a GPU does."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return replace(FP32, varlen=True)


def model_of(bundle: Bundle, target: Target) -> Any:
    assert bundle.torch is not None
    return torch_engine._Model(bundle.torch, torch_engine._read_weights(bundle), target)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_kernel_for_all_rows_gives_the_same(tiny_bundle: Bundle, one_kernel: Target, pooling: str) -> None:
    bundle = with_torch_form(tiny_bundle, classifier(pooling=pooling))
    engine = TorchEngine(bundle, target=one_kernel)
    assert model_of(bundle, one_kernel).attends_to_any_lengths
    np.testing.assert_allclose(engine.classify(TEXTS), TorchEngine(bundle, target=FP32).classify(TEXTS), atol=1e-5)


def test_heads_the_kernel_does_not_take_are_attended_to_by_length(tiny_bundle: Bundle, one_kernel: Target) -> None:
    bundle = with_torch_form(tiny_bundle, classifier(num_attention_heads=8))
    assert not model_of(bundle, one_kernel).attends_to_any_lengths
    np.testing.assert_allclose(
        TorchEngine(bundle, target=one_kernel).classify(TEXTS),
        TorchEngine(bundle, target=FP32).classify(TEXTS),
        atol=1e-6,
    )


class Captures:
    """Captures as CUDA does: the work is done again with the same tensors, and into the same one."""

    def __init__(self, *, stale: bool = False) -> None:
        self.replays = 0
        self._stale = stale

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        output = work().clone()

        def replay() -> Any:
            self.replays += 1
            return output if self._stale else output.copy_(work())

        return replay


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[:2], TEXTS[1:5], [[5] * 8], TEXTS * 2])
def test_filled_batches_give_what_the_model_gives(
    tiny_bundle: Bundle, one_kernel: Target, pooling: str, texts: list[list[int]]
) -> None:
    model = model_of(with_torch_form(tiny_bundle, classifier(pooling=pooling)), one_kernel)
    captures = Captures()
    graphs = torch_engine._Graphs(model, BUCKETS, tiny_bundle.max_length, captures, torch.inference_mode)
    with torch.inference_mode():
        assert captures.replays == len(BUCKETS)
        first = graphs.run(pack(texts))
        assert graphs.run(pack([[1, 9, 9, 2]])).shape == (1, 3)
        np.testing.assert_allclose(first, model.run(pack(texts)), atol=1e-5)
        np.testing.assert_allclose(graphs.run(pack(texts)), first, atol=1e-6)
    assert captures.replays == len(BUCKETS) + 1 + (2 if len(texts) <= 4 else 0)


def test_a_graph_that_gives_something_else_is_refused(torch_bundle: Bundle, one_kernel: Target) -> None:
    model = model_of(torch_bundle, one_kernel)
    with pytest.raises(EngineError, match="captured for 32 tokens"):
        torch_engine._Graphs(model, BUCKETS, 8, Captures(stale=True), torch.inference_mode)


def test_a_row_longer_than_a_graph_was_captured_for_runs_without(torch_bundle: Bundle, one_kernel: Target) -> None:
    model, captures = model_of(torch_bundle, one_kernel), Captures()
    graphs = torch_engine._Graphs(model, BUCKETS, 8, captures, torch.inference_mode)
    batch = pack([[1, 2], [5] * 9])
    with torch.inference_mode():
        np.testing.assert_array_equal(graphs.run(batch), model.run(batch))
    assert captures.replays == len(BUCKETS)


def test_texts_longer_than_the_model_has_positions_for_are_refused_at_load(torch_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="20 tokens is longer than 16"):
        TorchEngine(replace(torch_bundle, max_length=20), target=FP32)


def test_a_device_that_captures_nothing_is_done_without_graphs(
    torch_bundle: Bundle, one_kernel: Target, capfd: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    model = model_of(torch_bundle, one_kernel)
    assert torch_engine._open_graphs(model, replace(one_kernel, device="cuda"), 8, torch.inference_mode) is None
    assert "engine.graphs_refused" in "".join(capfd.readouterr())
    assert torch_engine._open_graphs(model, one_kernel, 8, torch.inference_mode) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_gives_what_the_cpu_gives(tiny_bundle: Bundle) -> None:
    model = classifier(pooling="mean")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    bundle = with_torch_form(tiny_bundle, model)
    engine = TorchEngine(bundle)
    assert engine.target.device == "cuda"
    assert (engine._graphs is not None) == engine.target.captures
    np.testing.assert_allclose(engine.classify(TEXTS), TorchEngine(bundle, target=FP32).classify(TEXTS), atol=0.01)


def test_importing_the_engine_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, overtone.engine; print(sorted({'torch', 'safetensors', 'onnxruntime'} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert ran.stdout.strip() == "[]"
