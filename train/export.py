"""From trained weights to a bundle: ONNX, fusion, int8 or fp16, parity, calibration, evaluation."""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import (
    MANIFEST_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    Bundle,
    BundleSpec,
    Golden,
    TextEncoder,
    load_bundle,
    probabilities,
    write_bundle,
)
from overtone.engine import check_golden, classify_sorted, open_engine
from overtone.errors import BundleError, OvertoneError
from overtone.logging import get_logger
from overtone.torch_engine import Target, TorchEngine
from overtone.torch_form import TORCH_FOLDER
from train.calibrate import measure_scales, sample_of
from train.config import TrainConfig
from train.data import LabelledTexts, Split, log_prior, pad
from train.encoder import encoder_of, open_trained
from train.graph import freeze_scales, pack_rows, quantised_tensors, split_attention
from train.scores import Scores, fit_temperature, score, softmax
from train.torch_form import torch_form_of, write_torch_form

CARD_FILE = "README.md"
_FUSES_AS_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
_PARITY_TEXTS = 64
_TORCH_FP32 = Target("cpu", "fp32", varlen=False, reason="what is compared with the ONNX model")
_TORCH_BF16 = Target("cpu", "bf16", varlen=False, reason="what processors and devices that have it run")
_QUANTISED = ["MatMul", "Attention", "Gather", "EmbedLayerNormalization"]


@dataclass(frozen=True)
class Exported:
    """A finished bundle and what was measured of it on the validation texts."""

    bundle: Bundle
    scores: Scores
    """Of the bundle as it is served."""
    reference: Scores
    """Of the same model in fp32."""


def export_bundle(weights: Path, output: Path, config: TrainConfig, split: Split, facts: Mapping[str, Any]) -> Exported:
    """Make the folder `output` a bundle of the model in `weights`.

    `facts` is recorded in the manifest beside the metrics. An older bundle in `output` is replaced once the new one is
    finished and checked, and stays as it was when anything fails.

    Raises:
        OvertoneError: the ONNX model does not give what the torch model gives, its attention was not fused, int8
            costs more than `export.max_int8_loss`, fp16 changes scores by more than `export.max_fp16_difference`, or
            the torch form does not give what the ONNX model gives.
    """
    log = get_logger()
    validation = split.validation
    with tempfile.TemporaryDirectory(prefix="overtone-") as scratch:
        # The fusions below know attention that is written out, not the fused kernel of torch.
        model, tokenizer = open_trained(weights, attention="eager")
        _offset_prior(model, split.train, config)
        plain, fused, small = (Path(scratch) / name for name in ("plain.onnx", "fused.onnx", "small.onnx"))
        _to_onnx(model, plain)
        if config.export.operators == "fused":
            _fuse(plain, fused, model.config)
        full = fused if config.export.operators == "fused" else plain
        reference = _candidate(Path(scratch) / "fp32", full, tokenizer, config, precision="fp32")
        difference = _parity(model, tokenizer, reference, config, validation.texts[:_PARITY_TEXTS])
        log.info("export.checked", largest_logit_difference=difference)
        reference_logits = log_scores(reference, validation.texts)
        chosen, logits = reference, reference_logits
        if config.export.precision == "int8":
            sample = TextEncoder(reference).encode(sample_of(split.train.texts))
            _quantise(full, small, sample)
            chosen = _candidate(Path(scratch) / "int8", small, tokenizer, config, precision="int8")
            logits = log_scores(chosen, validation.texts)
            _require_small_loss(logits, reference_logits, validation, config)
        elif config.export.precision == "fp16":
            _halve(full, small)
            chosen = _candidate(Path(scratch) / "fp16", small, tokenizer, config, precision="fp16")
            logits = log_scores(chosen, validation.texts)
            _require_same(logits, reference_logits, config)
        measured: dict[str, Any] = {**facts, "parity": difference}
        if config.export.torch:
            measured["torch"] = _add_torch_form(chosen, model, reference_logits, validation, config)
        exported = _finish(chosen, logits, reference_logits, config, validation, measured)
        return replace(exported, bundle=_publish(exported.bundle, output))


def log_scores(bundle: Bundle, texts: Sequence[str], on_torch: Target | None = None) -> NDArray[np.float32]:
    """Log probabilities, shape [texts, labels], of the bundle's own engine, or of its torch form."""
    threads = os.cpu_count() or 1
    engine = TorchEngine(bundle, threads, on_torch) if on_torch else open_engine(bundle, threads)
    try:
        scores = classify_sorted(engine, TextEncoder(bundle).encode(texts))
    finally:
        engine.close()
    return np.log(np.maximum(scores, np.finfo(np.float32).tiny))


def _offset_prior(model: Any, train: LabelledTexts, config: TrainConfig) -> None:
    """Take the log class prior, times `export.prior_offset`, off the logits by way of the last layer's bias."""
    import torch

    if not config.export.prior_offset:
        return
    last = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1]
    shift = config.export.prior_offset * log_prior(train.labels, len(config.data.labels))
    with torch.no_grad():
        last.bias.sub_(torch.from_numpy(shift))


def _to_onnx(model: Any, target: Path) -> None:
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model, task="text-classification", library_name="transformers"
    )
    layout = _single_segment(constructor(model.config))
    with warnings.catch_warnings():
        # The exporter's own: tracing, and torch announcing its next exporter.
        warnings.simplefilter("ignore")
        export(model, layout, target, opset=17)


def _single_segment(layout: Any) -> Any:
    """`layout` without the input for segment ids, which are all 0 for single texts."""
    inputs = {name: axes for name, axes in layout.inputs.items() if name != "token_type_ids"}
    layout.__class__ = type("SingleSegment", (type(layout),), {"inputs": property(lambda _self: inputs)})
    return layout


def _fuse(plain: Path, target: Path, shape: Any) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    if shape.model_type not in _FUSES_AS_BERT:
        raise OvertoneError(f"models of type {shape.model_type} cannot be exported; known: {', '.join(_FUSES_AS_BERT)}")
    options = FusionOptions("bert")
    # On CPU these two kernels are slower than the parts they replace (measured with `python -m benchmarks`).
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_bias_gelu = False
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers
    optimised = optimizer.optimize_model(
        str(plain),
        model_type="bert",
        num_heads=heads,
        hidden_size=shape.hidden_size,
        opt_level=0,
        optimization_options=options,
    )
    fused = optimised.get_fused_operator_statistics().get("Attention", 0)
    if fused != layers:
        raise OvertoneError(f"the attention of {fused} of {layers} layers was fused; the export would be slow")
    split_attention(optimised.model)
    optimised.save_model_to_file(str(target))


def _quantise(fused: Path, target: Path, sample: Sequence[Sequence[int]]) -> None:
    """int8 weights by the channel; activations by scales measured on the token ids `sample`."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The standard operator has the name of the fused one, whose weights the quantiser looks for.
    nodes = onnx.load(fused).graph.node
    standard = [node.name for node in nodes if node.op_type == "Attention" and not node.domain]
    # One row a text, so float32 costs nothing there. The quantiser turns `Gemm` into a product of this name.
    head = [f"{node.name}_MatMul" for node in nodes if node.op_type == "Gemm"]
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it logs to the root logger, about models that were not pre-processed
    try:
        quantize_dynamic(
            fused,
            target,
            op_types_to_quantize=_QUANTISED,
            nodes_to_exclude=[*standard, *head],
            per_channel=True,
            reduce_range=False,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        root.setLevel(before)
    model = onnx.load(target)
    freeze_scales(model, measure_scales(model, quantised_tensors(model), sample))
    pack_rows(model)
    onnx.save(model, target)


def _halve(full: Path, target: Path) -> None:
    """Weights and arithmetic in float16; token ids and logits keep their types.

    Numbers that float16 has not, such as what a mask adds to the scores of padding, become the nearest it has.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each number that is cut
        onnx.save(convert_float_to_float16(onnx.load(full), keep_io_types=True), target)


def _candidate(folder: Path, model: Path, tokenizer: Any, config: TrainConfig, *, precision: Any) -> Bundle:
    """A bundle of `model` that is complete but for its temperature and golden scores."""
    folder.mkdir()
    shutil.copyfile(model, folder / MODEL_FILE)
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    fast.save(str(folder / TOKENIZER_FILE))
    even = tuple(1 / len(config.data.labels) for _ in config.data.labels)
    spec = BundleSpec(
        name=config.name,
        labels=config.data.labels,
        max_length=config.model.max_length,
        temperature=1.0,
        precision=precision,
        golden=tuple(Golden(text, even) for text in config.export.golden),
        base_model=config.export.base_model or config.model.name,
        license=config.export.license,
    )
    return write_bundle(folder, spec=spec)


def _parity(model: Any, tokenizer: Any, reference: Bundle, config: TrainConfig, texts: Sequence[str]) -> float:
    """Largest difference between a log probability of the torch model and of its fp32 ONNX form, over `texts`."""
    import torch

    rows = encoder_of(tokenizer, config.model.max_length)(texts)
    if rows != TextEncoder(reference).encode(texts):
        raise OvertoneError("the bundle's tokenizer does not give the token ids that training used")
    ids, mask = (torch.from_numpy(array) for array in pad(rows, tokenizer.pad_token_id))
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits.log_softmax(dim=1).numpy()
    difference = float(np.abs(expected - log_scores(reference, texts)).max())
    if not difference <= config.export.max_parity_difference:
        raise OvertoneError(
            f"a log probability of the ONNX model is {difference:.2g} away from the torch model's; "
            f"export.max_parity_difference allows {config.export.max_parity_difference:.2g}"
        )
    return difference


def _add_torch_form(
    bundle: Bundle, model: Any, reference: NDArray[np.float32], validation: LabelledTexts, config: TrainConfig
) -> dict[str, float]:
    """Write the torch form of `model` into `bundle`, calibrated and checked, and say what was measured of it.

    `reference` is the log probabilities of the fp32 ONNX model for the `validation` texts.
    """
    even = tuple(golden.scores for golden in bundle.golden)
    form, weights = torch_form_of(model, even)
    write_torch_form(bundle.path, form, weights)
    raw = write_bundle(bundle.path, spec=bundle.spec)
    logits = log_scores(raw, validation.texts, _TORCH_FP32)
    difference = float(np.abs(logits - reference).max())
    if not difference <= config.export.max_parity_difference:
        raise OvertoneError(
            f"a log probability of the torch weights is {difference:.2g} away from the ONNX model's; "
            f"export.max_parity_difference allows {config.export.max_parity_difference:.2g}; set export.torch=false"
        )
    temperature = round(fit_temperature(logits, validation.labels), 4)
    golden = probabilities(log_scores(raw, config.export.golden, _TORCH_FP32), temperature)
    scores = tuple(tuple(round(float(one), 6) for one in row) for row in golden)
    write_torch_form(bundle.path, form.model_copy(update={"temperature": temperature, "golden": scores}))
    finished = write_bundle(bundle.path, spec=bundle.spec)
    for target in (_TORCH_FP32, _TORCH_BF16):
        engine = TorchEngine(finished, os.cpu_count() or 1, target)
        try:
            check_golden(finished, engine)
        finally:
            engine.close()
    ece = score(probabilities(logits, temperature), validation.labels, config.data.labels).ece
    return {"parity": difference, "temperature": temperature, "ece": ece}


def _require_small_loss(
    logits: NDArray[np.float32], reference: NDArray[np.float32], validation: LabelledTexts, config: TrainConfig
) -> None:
    small, full = (
        score(softmax(one), validation.labels, config.data.labels).macro_recall for one in (logits, reference)
    )
    if full - small > config.export.max_int8_loss:
        raise OvertoneError(
            f"int8 costs {full - small:.4f} of macro-averaged recall ({full:.4f} to {small:.4f}); "
            f"export.max_int8_loss allows {config.export.max_int8_loss}; set export.precision=fp32 or train longer"
        )


def _require_same(logits: NDArray[np.float32], reference: NDArray[np.float32], config: TrainConfig) -> None:
    difference = float(np.abs(np.exp(logits) - np.exp(reference)).max())
    if not difference <= config.export.max_fp16_difference:
        raise OvertoneError(
            f"fp16 changes a score by {difference:.2g}; export.max_fp16_difference allows "
            f"{config.export.max_fp16_difference:.2g}; set export.precision=fp32"
        )


def _finish(
    candidate: Bundle,
    logits: NDArray[np.float32],
    reference_logits: NDArray[np.float32],
    config: TrainConfig,
    validation: LabelledTexts,
    facts: Mapping[str, Any],
) -> Exported:
    """Calibrate `candidate`, evaluate it as it will be served, and write its manifest."""
    temperature = round(fit_temperature(logits, validation.labels), 4)
    names = config.data.labels
    raw = score(probabilities(logits, 1.0), validation.labels, names)
    scores = score(probabilities(logits, temperature), validation.labels, names)
    reference = score(probabilities(reference_logits, temperature), validation.labels, names)
    metrics = {
        "validation": scores.as_dict(),
        "fp32": {
            "macro_recall": reference.macro_recall,
            "macro_f1": reference.macro_f1,
            "accuracy": reference.accuracy,
        },
        "ece_before_calibration": raw.ece,
        **facts,
    }
    spec = replace(candidate.spec, temperature=temperature, metrics=metrics)
    calibrated = write_bundle(candidate.path, spec=spec)
    bundle = write_bundle(candidate.path, spec=replace(spec, golden=_golden(calibrated, config.export.golden)))
    engine = open_engine(bundle)
    try:
        check_golden(bundle, engine)
    finally:
        engine.close()
    return Exported(bundle, scores, reference)


def _golden(bundle: Bundle, texts: Sequence[str]) -> tuple[Golden, ...]:
    scores = np.exp(log_scores(bundle, texts))
    return tuple(
        Golden(text, tuple(round(float(one), 6) for one in row)) for text, row in zip(texts, scores, strict=True)
    )


def _publish(bundle: Bundle, output: Path) -> Bundle:
    fresh = {name: (output / name).with_name(f".{Path(name).name}.new") for name in bundle.files}
    for name, path in fresh.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, path)
    for name, path in fresh.items():
        os.replace(path, output / name)
    if bundle.torch is None:
        shutil.rmtree(output / TORCH_FOLDER, ignore_errors=True)
    return load_bundle(output)


def require_bundle_folder(output: Path) -> None:
    """Refuse an output folder that holds something other than a bundle.

    Raises:
        BundleError: naming the folder.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / MANIFEST_FILE).is_file()):
        raise BundleError(f"{output}: holds something else than a bundle; name an empty or a new folder")
