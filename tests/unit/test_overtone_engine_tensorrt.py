"""How TensorRT is told to run a bundle. It was never run: the runtime here knows neither its name nor its options."""

import multiprocessing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.bundle import Bundle
from overtone.engine import CPU, Device, OnnxEngine, choose_engine, open_engine
from overtone.errors import BundleError, ConfigurationError
from overtone.sessions import TENSORRT, open_runner, tensorrt_for
from overtone.shapes import MAX_BATCH_TOKENS, shape_profile

ON_CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]
ON_TENSORRT = ["TensorrtExecutionProvider", *ON_CUDA]


@given(st.integers(3, 8192), st.integers(1, 20_000))
def test_the_profile_spans_every_batch(max_length: int, batch_tokens: int) -> None:
    profile = shape_profile(max_length, batch_tokens)
    least, usual, most = profile.least, profile.usual, profile.most
    assert (least.rows, least.length) == (1, 1)
    assert most.length == max_length
    assert most.rows == 1 or most.tokens <= batch_tokens
    assert least.rows <= usual.rows <= most.rows
    assert least.length <= usual.length <= most.length


def test_the_options_are_those_of_the_provider(tiny_bundle: Bundle, tmp_path: Path) -> None:
    device = tensorrt_for(tiny_bundle, tmp_path)
    rows = MAX_BATCH_TOKENS // 8
    kept = tmp_path / f"{tiny_bundle.version}-{onnxruntime.__version__}-{rows}x8"
    assert device.options == {
        "trt_fp16_enable": "True",
        "trt_layer_norm_fp32_fallback": "True",
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:32x8,attention_mask:32x8",
        "trt_profile_max_shapes": f"input_ids:{rows}x8,attention_mask:{rows}x8",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
    }
    assert (device.provider, device.folder, device.max_rows) == (TENSORRT.provider, kept, rows)
    assert not [name for name in tensorrt_for(tiny_bundle, None).options if "cache" in name]


def test_tensorrt_is_taken_only_when_asked_for() -> None:
    assert choose_engine("auto", ON_TENSORRT, "fp16").name == "onnx-cuda"
    assert choose_engine("onnx-tensorrt", ON_TENSORRT, "fp16").name == "onnx-tensorrt"
    with pytest.raises(ConfigurationError, match=r"onnx-tensorrt.*no TensorRT"):
        choose_engine("onnx-tensorrt", ON_CUDA, "fp16")
    with pytest.raises(ConfigurationError, match="no CUDA device"):
        choose_engine("onnx-tensorrt", ["CPUExecutionProvider"], "fp16")
    with pytest.raises(BundleError, match=r"onnx-tensorrt.*export\.precision: fp16"):
        choose_engine("onnx-tensorrt", ON_TENSORRT, "int8")


@pytest.mark.skipif(TENSORRT.provider in onnxruntime.get_available_providers(), reason="this runtime has TensorRT")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_tensorrt_that_does_not_start_is_an_error(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="TensorrtExecutionProvider"):
        open_engine(tiny_bundle, wanted="onnx-tensorrt", providers=ON_TENSORRT, built=tmp_path)


def test_a_model_that_the_provider_cannot_run_whole_is_refused(tiny_bundle: Bundle) -> None:
    # This provider of the runtime here takes no operator at all.
    device = Device("AzureExecutionProvider", takes_turns=True, takes_all=True)
    if device.provider not in onnxruntime.get_available_providers():
        pytest.skip("this runtime has no provider that takes nothing")
    with pytest.raises(BundleError, match=r"export\.operators: standard"):
        OnnxEngine(tiny_bundle, device=device)


def test_more_rows_than_it_runs_at_once_are_run_in_parts(tiny_bundle: Bundle) -> None:
    texts = [[1, 4, 2], [1, 8, 8, 9, 2], [1, 2], [1, 6, 4, 5, 5, 5, 2], [1, 7, 2]]
    parts = OnnxEngine(tiny_bundle, device=Device(CPU.provider, CPU.disabled_fusions, takes_turns=True, max_rows=2))
    np.testing.assert_allclose(parts.classify(texts), OnnxEngine(tiny_bundle).classify(texts), atol=1e-6)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux tells who waits for a lock")
def test_one_process_at_a_time_opens_with_a_folder(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "built"
    device = Device(CPU.provider, takes_turns=True, folder=folder)
    open_runner(tiny_bundle, 1, device).close()
    waiting = multiprocessing.get_context("spawn").Process(target=_open, args=(tiny_bundle.path, folder))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        while not _waits_for_a_lock(waiting.pid):
            waiting.join(0.02)
            assert waiting.exitcode is None
    waiting.join(30)
    assert waiting.exitcode == 0


def test_a_folder_that_cannot_be_made_is_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be written"):
        open_runner(tiny_bundle, 1, Device(CPU.provider, takes_turns=True, folder=tmp_path / "file" / "built"))


def _waits_for_a_lock(pid: int | None) -> bool:
    blocked = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines() if "->" in line]
    return any(str(pid) in line for line in blocked)


def _open(bundle: Path, folder: Path) -> None:
    from overtone.bundle import load_bundle

    open_runner(load_bundle(bundle), 1, Device(CPU.provider, takes_turns=True, folder=folder)).close()
