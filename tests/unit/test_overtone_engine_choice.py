"""Which engine runs a bundle, by what the machine has."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from overtone import torch_engine
from overtone.bundle import Bundle, BundleSpec, Precision, write_bundle
from overtone.engine import (
    CPU,
    CUDA,
    Device,
    EngineName,
    OnnxEngine,
    choose_engine,
    is_slow,
    open_engine,
    usable_providers,
)
from overtone.errors import BundleError, ConfigurationError, EngineError
from overtone.hardware import has_fast_bf16, has_fast_int8, read_cpu_features
from overtone.settings import WantedEngine

ON_CPU = ["AzureExecutionProvider", "CPUExecutionProvider"]
ON_GPU = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
TEXTS = [[1, 4, 2], [1, 8, 8, 9, 2], [1, 2]]


@pytest.mark.parametrize(
    ("wanted", "providers", "precision", "name", "reason"),
    [
        ("auto", ON_CPU, "int8", "onnx-cpu", "no CUDA device"),
        ("auto", ON_CPU, "fp32", "onnx-cpu", "no CUDA device"),
        ("auto", ON_GPU, "int8", "onnx-cpu", "int8"),
        ("auto", ON_GPU, "fp32", "onnx-cuda", "fp32"),
        ("auto", ON_GPU, "fp16", "onnx-cuda", "fp16"),
        ("onnx-cpu", ON_GPU, "fp32", "onnx-cpu", "ENGINE"),
        ("onnx-cuda", ON_GPU, "fp32", "onnx-cuda", "ENGINE"),
    ],
)
def test_the_choice_and_its_reason(
    wanted: WantedEngine, providers: list[str], precision: Precision, name: EngineName, reason: str
) -> None:
    choice = choose_engine(wanted, providers, precision)
    assert choice.name == name
    assert reason in choice.reason


def test_cuda_that_is_not_there_is_an_error_of_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="ENGINE=auto"):
        choose_engine("onnx-cuda", ON_CPU, "fp32")


def test_cuda_for_an_int8_bundle_is_an_error_of_the_bundle() -> None:
    with pytest.raises(BundleError, match=r"export\.precision: fp16"):
        choose_engine("onnx-cuda", ON_GPU, "int8")


@pytest.mark.parametrize("providers", [ON_CPU, ON_GPU])
def test_torch_is_never_chosen_unasked(providers: list[str]) -> None:
    for precision in ("int8", "fp32", "fp16"):
        assert choose_engine("auto", providers, precision, has_torch_form=True).name.startswith("onnx-")


def test_torch_needs_its_package_and_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "find_spec", lambda name: object())
    assert choose_engine("torch", ON_CPU, "int8", has_torch_form=True).name == "torch"
    with pytest.raises(BundleError, match=r"export\.torch: true"):
        choose_engine("torch", ON_CPU, "int8")
    monkeypatch.setattr(torch_engine, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(ConfigurationError, match=r"torch is not installed.*overtone\[torch\]"):
        choose_engine("torch", ON_CPU, "int8", has_torch_form=True)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_device_that_cannot_be_used_is_named(tiny_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match="AbsentExecutionProvider"):
        OnnxEngine(tiny_bundle, device=Device("AbsentExecutionProvider"))
    assert "EP Error" not in capfd.readouterr().out


def test_a_model_that_fails_on_the_first_text_is_refused(tiny_bundle: Bundle, bundle_spec: BundleSpec) -> None:
    model = onnx.load(tiny_bundle.model_path)
    table = next(one for one in model.graph.initializer if one.name == "table")
    table.CopyFrom(onnx.numpy_helper.from_array(np.empty((0, 3), dtype=np.float32), "table"))
    onnx.save(model, tiny_bundle.model_path)
    with pytest.raises(BundleError, match=r"model\.onnx: fails on CPUExecutionProvider"):
        OnnxEngine(write_bundle(tiny_bundle.path, spec=bundle_spec))


@pytest.mark.skipif(CUDA.provider in usable_providers(), reason="this machine has CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_device_that_fails_to_start_is_done_without_unless_it_was_asked_for(
    tiny_bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = OnnxEngine(tiny_bundle).classify(TEXTS)
    np.testing.assert_array_equal(open_engine(tiny_bundle, providers=ON_GPU).classify(TEXTS), expected)
    assert "engine.device_refused" in "".join(capfd.readouterr())
    with pytest.raises(BundleError, match="CUDAExecutionProvider"):
        open_engine(tiny_bundle, wanted="onnx-cuda", providers=ON_GPU)


def test_a_device_that_takes_turns_gives_the_same_scores(tiny_bundle: Bundle) -> None:
    device = OnnxEngine(tiny_bundle, device=Device(CPU.provider, CPU.disabled_fusions, takes_turns=True))
    np.testing.assert_array_equal(device.classify(TEXTS), OnnxEngine(tiny_bundle).classify(TEXTS))
    with pytest.raises(EngineError, match="batch of"):
        device.classify([[1, 99, 2]])


def test_the_cpu_can_be_asked_for(tiny_bundle: Bundle) -> None:
    assert open_engine(tiny_bundle, wanted="onnx-cpu").classify(TEXTS).shape == (3, 3)
    assert CUDA.takes_turns
    assert not CUDA.disabled_fusions


@pytest.mark.parametrize(
    ("text", "features", "is_fast"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", {"avx2", "avx512f", "avx512_vnni"}, True),
        ("flags\t: fpu sse2 avx2\nflags\t: fpu sse2 avx2\n", {"avx2"}, False),
        ("flags\t: avx2 avx_vnni amx_int8\n", {"avx2", "avx_vnni", "amx_int8"}, True),
        ("Features\t: fp asimd asimddp\n", {"asimddp"}, True),
        ("Features\t: fp asimd\n", set(), False),
        ("", set(), False),
    ],
)
def test_features_of_processors(tmp_path: Path, text: str, features: set[str], is_fast: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert read_cpu_features(file) == features
    assert has_fast_int8(read_cpu_features(file)) is is_fast


def test_only_int8_without_its_instructions_is_slow() -> None:
    assert is_slow("int8", frozenset({"avx2"}))
    assert not is_slow("fp32", frozenset({"avx2"}))
    assert not is_slow("int8", frozenset({"avx2", "avx_vnni"}))
    assert not is_slow("int8", None)


def test_a_system_that_does_not_tell_is_not_blamed(tmp_path: Path) -> None:
    assert read_cpu_features(tmp_path / "absent") is None
    assert has_fast_int8(None) is None
    assert not has_fast_bf16(None)


@pytest.mark.parametrize(("flags", "is_fast"), [("avx2 avx512_vnni", False), ("avx512_bf16", True), ("amx_bf16", True)])
def test_bf16_is_fast_where_it_is_multiplied(tmp_path: Path, flags: str, is_fast: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"flags\t: fpu {flags}\n")
    assert has_fast_bf16(read_cpu_features(file)) is is_fast
