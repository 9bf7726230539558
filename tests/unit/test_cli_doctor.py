"""What the doctor says of the engine."""

from dataclasses import replace
from pathlib import Path

import pytest

from overtone import torch_engine
from overtone.bundle import Bundle
from overtone.cli.doctor import (
    Finding,
    built_finding,
    examine,
    layout_finding,
    other_finding,
    processor_finding,
    runtime_finding,
    torch_finding,
)
from overtone.engine import CUDA, usable_providers
from overtone.torch_engine import choose_target
from overtone.torch_form import TorchForm


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVERTONE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_engine_is_named_with_its_reason(home: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUNDLE", str(tiny_bundle.path))
    monkeypatch.setenv("ENGINE", "onnx-cpu")
    findings = named(examine())
    assert findings["engine"] == Finding("engine", "ok", "onnx-cpu: ENGINE asks for it")
    assert {"processor", "layout", "onnx runtime", "torch"} <= findings.keys()
    assert "bench" not in findings


def test_the_engine_runs_for_a_second(home: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUNDLE", str(tiny_bundle.path))
    assert "texts/s by one thread" in named(examine(bench_s=0.01))["bench"].found


def test_a_missing_bundle_is_one_problem_and_no_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUNDLE", str(home / "absent"))
    findings = named(examine(bench_s=0.01))
    assert findings["bundle"].level == "problem"
    assert not {"engine", "processor", "bench"} & findings.keys()


def test_an_engine_that_cannot_be_had_is_a_problem_with_advice(
    home: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    if CUDA.provider in usable_providers():
        pytest.skip("this machine has CUDA")
    monkeypatch.setenv("BUNDLE", str(tiny_bundle.path))
    monkeypatch.setenv("ENGINE", "onnx-cuda")
    finding = named(examine())["engine"]
    assert finding.level == "problem"
    assert "ENGINE=auto" in finding.found
    assert finding.advice


def test_two_runtimes_are_one_too_many() -> None:
    assert runtime_finding({"onnxruntime": "1.32.0"}).level == "ok"
    assert runtime_finding({"onnxruntime-gpu": "1.32.0"}) == Finding("onnx runtime", "ok", "onnxruntime-gpu 1.32.0")
    both = runtime_finding({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"})
    assert both.level == "warning"
    assert "pip uninstall" in both.advice


def test_more_replicas_than_cores_are_named() -> None:
    assert layout_finding(2, 2) == Finding("layout", "ok", "2 replicas x 1 thread on 2 cores")
    crowded = layout_finding(4, 2)
    assert crowded.level == "warning"
    assert "SERVE_REPLICAS=2" in crowded.advice


def test_int8_on_an_old_processor_is_named(tiny_bundle: Bundle) -> None:
    int8 = replace(tiny_bundle, precision="int8")
    assert processor_finding(int8, frozenset({"avx2", "avx_vnni"})) == Finding("processor", "ok", "avx_vnni, avx2")
    assert processor_finding(int8, frozenset({"avx2"})).level == "warning"
    assert processor_finding(tiny_bundle, frozenset({"avx2"})).level == "ok"
    assert processor_finding(int8, None).level == "ok"


def test_the_doctor_says_whether_tensorrt_has_still_to_build(tiny_bundle: Bundle, tmp_path: Path) -> None:
    before = built_finding(tmp_path, tiny_bundle)
    assert before.level == "warning"
    assert "overtone doctor --bench" in before.advice
    folder = tmp_path / f"{tiny_bundle.version}-1.32.0-128x128"
    folder.mkdir()
    (folder / "TensorrtExecutionProvider_0_sm90.engine").touch()
    assert built_finding(tmp_path, tiny_bundle).level == "ok"


def test_the_doctor_says_why_torch_is_not_what_runs(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    without = other_finding(tiny_bundle)
    assert without.level == "ok"
    assert "auto never chooses it" in without.found
    assert "export.torch: true" in without.found
    form = TorchForm(
        layers=1, heads=1, activation="gelu", epsilon=1e-12, pooling="mean", temperature=1.0, golden=((1.0, 0.0, 0.0),)
    )
    holding = replace(tiny_bundle, torch=form)
    monkeypatch.setattr(torch_engine, "find_spec", lambda name: object())
    assert "ENGINE=torch would run" in other_finding(holding).found
    monkeypatch.setattr(torch_engine, "find_spec", lambda name: None)
    assert "torch is not installed" in other_finding(holding).found


def test_the_doctor_says_how_torch_runs() -> None:
    assert (
        "bf16 on cpu: the processor multiplies bf16"
        in torch_finding(choose_target(frozenset({"amx_bf16"}), None)).found
    )
    assert "fp16 on cuda: a CUDA device of compute capability 7.5" in torch_finding(choose_target(None, (7, 5))).found


def test_torch_that_cannot_run_the_bundle_is_a_problem(
    home: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUNDLE", str(tiny_bundle.path))
    monkeypatch.setenv("ENGINE", "torch")
    finding = named(examine())["engine"]
    assert finding.level == "problem"
    assert "ENGINE is torch" in finding.found
    assert "ENGINE=auto" in finding.found
