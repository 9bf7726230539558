"""Bundles: written and read back whole, refused with a reason otherwise."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overtone.bundle import (
    Bundle,
    BundleSpec,
    Golden,
    TextEncoder,
    load_bundle,
    probabilities,
    to_prediction,
    write_bundle,
)
from overtone.errors import BundleError
from overtone.text import TEXT_VERSION


def _edit(bundle: Bundle, **changes: Any) -> None:
    path = bundle.path / "bundle.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_a_bundle_reads_back_as_it_was_written(bundle_files: Path, bundle_spec: BundleSpec) -> None:
    written = write_bundle(bundle_files, spec=bundle_spec)
    assert load_bundle(bundle_files) == written
    assert written.labels == bundle_spec.labels
    assert written.golden == bundle_spec.golden
    assert written.metrics == {"macro_recall": 0.5}
    assert written.text_version == TEXT_VERSION
    assert written.version.startswith("tiny-")
    assert set(written.sha256) == {"model.onnx", "tokenizer.json"}


def test_the_version_follows_what_changes_predictions(bundle_files: Path, bundle_spec: BundleSpec) -> None:
    version = write_bundle(bundle_files, spec=bundle_spec).version
    same = write_bundle(bundle_files, spec=replace(bundle_spec, metrics={"macro_recall": 0.9}, license="MIT")).version
    hotter = write_bundle(bundle_files, spec=replace(bundle_spec, temperature=3.0)).version
    shorter = write_bundle(bundle_files, spec=replace(bundle_spec, max_length=7)).version
    assert version == same
    assert len({version, hotter, shorter}) == 3


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: there is no such folder"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "bundle.json"])
def test_a_missing_file_is_named(tiny_bundle: Bundle, name: str) -> None:
    (tiny_bundle.path / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: the file is missing"):
        load_bundle(tiny_bundle.path)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_changed_file_is_refused(tiny_bundle: Bundle, name: str) -> None:
    with (tiny_bundle.path / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match=f"{name}: its sha256"):
        load_bundle(tiny_bundle.path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format is 2, this version reads format 1"),
        ({"text_version": TEXT_VERSION + 1}, "normalises texts by rules"),
        ({"labels": ["only"]}, "labels"),
        ({"labels": ["a", "b"]}, "3 numbers for 2 labels"),
        ({"labels": ["a", "a", "b"]}, "named twice"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.5}, "temperature"),
        ({"max_length": 2}, "max_length"),
        ({"precision": "int3"}, "precision"),
        ({"golden": []}, "golden"),
        ({"golden": [{"text": "a", "scores": [0.5, 0.5]}]}, "golden.0.scores has 2 numbers"),
        ({"golden": [{"text": "a", "scores": [0.5, 0.5, 0.5]}]}, "add up to 1.5"),
        ({"sha256": {"model.onnx": "0"}}, "no entry for tokenizer.json"),
        ({"version": "tiny-00000000"}, "version is 'tiny-00000000'"),
        ({"temperature": 1.0}, "its contents are those of"),
        ({"name": "Bad Name"}, "name"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_reason(tiny_bundle: Bundle, changes: dict[str, Any], reason: str) -> None:
    _edit(tiny_bundle, **changes)
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(tiny_bundle.path)
    assert "bundle.json" in caught.value.message


FORM = {
    "layers": 1,
    "heads": 2,
    "activation": "gelu",
    "epsilon": 1e-12,
    "pooling": "mean",
    "temperature": 1.5,
    "golden": [[0.1, 0.2, 0.7]],
}


@pytest.fixture
def form_files(bundle_files: Path) -> Path:
    """`bundle_files` with a torch form; no weights are read here."""
    (bundle_files / "torch").mkdir()
    (bundle_files / "torch" / "config.json").write_text(json.dumps(FORM))
    (bundle_files / "torch" / "model.safetensors").write_bytes(b"weights")
    return bundle_files


def test_a_torch_form_is_part_of_the_bundle_and_of_its_version(form_files: Path, bundle_spec: BundleSpec) -> None:
    bundle = write_bundle(form_files, spec=bundle_spec)
    assert load_bundle(form_files) == bundle
    assert bundle.torch is not None
    assert (bundle.torch.temperature, bundle.torch.golden) == (1.5, ((0.1, 0.2, 0.7),))
    assert bundle.files == (
        "model.onnx",
        "tokenizer.json",
        "torch/config.json",
        "torch/model.safetensors",
        "bundle.json",
    )
    assert set(bundle.sha256) == set(bundle.files) - {"bundle.json"}
    bundle.torch_weights_path.write_bytes(b"others")
    assert write_bundle(form_files, spec=bundle_spec).version != bundle.version


def test_what_a_bundle_was_made_from_makes_the_same_one(form_files: Path, bundle_spec: BundleSpec) -> None:
    bundle = write_bundle(form_files, spec=bundle_spec)
    assert bundle.spec == bundle_spec
    assert write_bundle(form_files, spec=bundle.spec).version == bundle.version


@pytest.mark.parametrize("name", ["torch/config.json", "torch/model.safetensors"])
def test_a_torch_form_is_there_whole_or_not_at_all(form_files: Path, bundle_spec: BundleSpec, name: str) -> None:
    bundle = write_bundle(form_files, spec=bundle_spec)
    with (form_files / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match=f"{name}: its sha256"):
        load_bundle(form_files)
    (form_files / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: the file is missing"):
        load_bundle(form_files)
    with pytest.raises(BundleError, match=f"{name}: the file is missing"):
        write_bundle(form_files, spec=bundle_spec)
    _edit(bundle, sha256={key: value for key, value in bundle.sha256.items() if key != name})
    with pytest.raises(BundleError, match=f"no entry for {name}"):
        load_bundle(form_files)


def test_files_of_torch_that_the_manifest_does_not_name_are_not_the_bundles(tiny_bundle: Bundle) -> None:
    (tiny_bundle.path / "torch").mkdir()
    (tiny_bundle.path / "torch" / "config.json").write_text("{}")
    assert load_bundle(tiny_bundle.path) == tiny_bundle
    assert tiny_bundle.torch is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads": 0}, "heads"),
        ({"activation": "silu"}, "activation"),
        ({"temperature": 0}, "temperature"),
        ({"width": 16}, "width"),
        ({"golden": []}, "golden"),
        ({"golden": [[0.1, 0.2, 0.7]] * 2}, "golden has 2 rows for 1 golden texts"),
        ({"golden": [[0.3, 0.7]]}, "golden.0 has 2 numbers for 3 labels"),
    ],
)
def test_a_wrong_torch_form_is_refused_with_the_reason(
    form_files: Path, bundle_spec: BundleSpec, changes: dict[str, Any], reason: str
) -> None:
    (form_files / "torch" / "config.json").write_text(json.dumps({**FORM, **changes}))
    with pytest.raises(BundleError, match=rf"torch/config\.json: .*{reason}"):
        write_bundle(form_files, spec=bundle_spec)


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff"])
def test_a_manifest_that_is_no_json_object_is_refused(tiny_bundle: Bundle, content: str) -> None:
    (tiny_bundle.path / "bundle.json").write_text(content)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load_bundle(tiny_bundle.path)


def test_a_spec_that_would_not_load_is_not_written(bundle_files: Path, bundle_spec: BundleSpec) -> None:
    with pytest.raises(BundleError, match="golden"):
        write_bundle(bundle_files, spec=replace(bundle_spec, golden=(Golden("a", (1.0,)),)))
    assert not (bundle_files / "bundle.json").exists()


def test_the_encoder_normalises_and_truncates(tiny_bundle: Bundle) -> None:
    encoder = TextEncoder(tiny_bundle)
    assert encoder.encode(["love @bob", "hate " * 100, "", "http://x.y"]) == [
        [1, 4, 10, 2],
        [1, 8, 8, 8, 8, 8, 8, 2],
        [1, 2],
        [1, 11, 2],
    ]
    assert encoder.encode([]) == []


def test_the_encoder_takes_any_string(tiny_bundle: Bundle) -> None:
    encoder = TextEncoder(tiny_bundle)
    assert encoder.encode(["love \ud800", "love"]) == [[1, 4, 3, 2], [1, 4, 2]]
    assert encoder.encode(["love " * 50_000]) == [[1, 4, 4, 4, 4, 4, 4, 2]]


def test_threads_may_share_an_encoder(tiny_bundle: Bundle) -> None:
    encoder = TextEncoder(tiny_bundle)
    texts = [["love"] * n for n in range(1, 60)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(encoder.encode, texts))
    assert [len(result) for result in results] == list(range(1, 60))


def test_a_broken_tokenizer_is_refused(bundle_files: Path, bundle_spec: BundleSpec) -> None:
    (bundle_files / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextEncoder(write_bundle(bundle_files, spec=bundle_spec))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_probabilities_add_up_and_keep_the_order(scale: float) -> None:
    logits = np.array([[1, 2, 3], [-5, 0, -5]], dtype=np.float32) * np.float32(scale)
    before = logits.copy()
    result = probabilities(logits, 2.0)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.sum(axis=1), 1, rtol=1e-6)
    assert result.argmax(axis=1).tolist() == [2, 1]
    np.testing.assert_array_equal(logits, before)


def test_a_higher_temperature_is_less_sure() -> None:
    logits = np.array([[0, 1, 3]], dtype=np.float32)
    sureness = [float(probabilities(logits, temperature).max()) for temperature in (0.5, 1.0, 4.0)]
    assert sureness == sorted(sureness, reverse=True)


def test_a_prediction_carries_label_scores_and_version(tiny_bundle: Bundle) -> None:
    prediction = to_prediction(tiny_bundle, np.array([0.25, 0.125, 0.625], dtype=np.float32))
    assert prediction.label == "positive"
    assert prediction.confidence == 0.625
    assert prediction.scores == {"negative": 0.25, "neutral": 0.125, "positive": 0.625}
    assert prediction.model_version == tiny_bundle.version


def test_the_module_imports_no_heavy_library() -> None:
    code = (
        "import sys, overtone.bundle; print(sorted({'onnxruntime', 'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
