"""What the doctor says of the engine."""

from dataclasses import replace
from pathlib import Path

import pytest

from overtone.bundle import Bundle
from overtone.cli.doctor import Finding, built_finding, examine, layout_finding, processor_finding, runtime_finding
from overtone.engine import CUDA, usable_providers


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
    assert {"processor", "layout", "onnx runtime"} <= findings.keys()
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
