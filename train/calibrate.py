"""The scales by which an int8 model quantises its activations, measured on texts once and then kept."""

import random
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overtone.hardware import read_cpu_features
from overtone.sessions import forbid_saturation
from train.graph import Scale

TEXTS = 200
"""More change the scales by less than the rounding they are for."""

_STEPS = 255
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_VALUES = 500_000


def sample_of(texts: Sequence[str]) -> list[str]:
    """Texts to measure scales on, the same of the same training set."""
    return random.Random(0).sample(list(texts), min(TEXTS, len(texts)))


def measure_scales(model: Any, names: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Scale]:
    """The scale of each tensor `names` of the ONNX `model`, from what it holds for the token ids `rows`.

    Each text is run alone, so that no padding is measured.
    """
    from onnx import TensorProto, helper
    from onnxruntime import InferenceSession, SessionOptions

    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = SessionOptions()
    options.log_severity_level = 3
    forbid_saturation(options, read_cpu_features())
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    del model.graph.output[-len(names) :]
    held: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for row in rows:
        ids = np.array([row], dtype=np.int64)
        values = session.run(list(names), {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        for name, value in zip(names, values, strict=True):
            held[name].append(value.ravel())
    return {name: best_scale(np.concatenate(parts)) for name, parts in held.items()}


def best_scale(values: NDArray[np.float32]) -> Scale:
    """The scale with the least mean squared error on `values`, clipping rare ones where that pays."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    # At random: equal steps would meet the same few features of every token, and miss the one with the large values.
    sample = np.random.default_rng(0).choice(values, _VALUES) if len(values) > _VALUES else values
    errors: Mapping[Scale, float] = {
        scale: _error(sample, scale)
        for below, above in product(_SHARES, _SHARES)
        if (scale := _scale(low * below, high * above))
    }
    return min(errors, key=errors.__getitem__)


def _scale(low: float, high: float) -> Scale:
    # Zero stays exact: padding and what attention leaves out are zeros.
    step = max((high - low) / _STEPS, float(np.finfo(np.float32).tiny))
    return Scale(step, min(round(-low / step), _STEPS))


def _error(values: NDArray[np.float32], scale: Scale) -> float:
    whole = np.rint(values / np.float32(scale.step)) + np.float32(scale.zero)
    np.clip(whole, 0, _STEPS, out=whole)
    whole -= np.float32(scale.zero)
    whole *= np.float32(scale.step)
    return float(np.square(whole - values).mean())
