"""The model of a bundle as it is when nobody optimises it: the baseline of the engine.

The weights of the bundle, dequantised, in the Hugging Face model they came from, exported to ONNX and quantised by
`onnxruntime.quantization.quantize_dynamic` with its defaults. Needs the `train` extra.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overtone.bundle import MODEL_FILE, Bundle
from overtone.errors import BundleError

CACHE = Path(tempfile.gettempdir()) / f"overtone-plain-{os.getuid()}"
_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: NDArray[np.float32]
    """[inputs, outputs]."""
    bias: NDArray[np.float32]


def plain_model(bundle: Bundle) -> Path:
    """The ONNX file of the plainly quantised model of `bundle`, a BERT with a mean over its tokens; made once.

    Raises:
        BundleError: the model of the bundle is of another architecture.
    """
    CACHE.mkdir(mode=0o700, exist_ok=True)
    target = CACHE / f"{bundle.sha256[MODEL_FILE]}.onnx"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            full, small = Path(scratch) / "full.onnx", Path(scratch) / "small.onnx"
            _export(rebuild(bundle), full)
            _quantise(full, small)
            small.replace(target)
    return target


def rebuild(bundle: Bundle) -> Any:
    """The Hugging Face model with the weights of `bundle`."""
    import onnx
    import torch
    from transformers import BertConfig

    from train.pooling import classifier_class

    graph = _Graph(onnx.load(bundle.model_path))
    linears, embeddings = list(graph.linears()), graph.embeddings()
    if (len(linears) - 1) % len(_LAYER) or "word_embeddings.weight" not in embeddings:
        raise BundleError(f"{bundle.model_path}: not a BERT with a mean over its tokens, so it has no plain form")
    layers = len(linears) // len(_LAYER)
    words, hidden = embeddings["word_embeddings.weight"].shape
    shape = BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=graph.heads(),
        intermediate_size=linears[4].weight.shape[1],
        max_position_embeddings=embeddings["position_embeddings.weight"].shape[0],
        num_labels=len(bundle.labels),
        pooling="mean",
        attn_implementation="eager",
    )
    state = {f"bert.embeddings.{name}": value for name, value in embeddings.items()}
    places = [f"bert.encoder.layer.{number}.{part}" for number in range(layers) for part in _LAYER]
    for place, linear in zip([*places, "classifier"], linears, strict=True):
        state |= {f"{place}.weight": linear.weight.T, f"{place}.bias": linear.bias}
    norms = [f"bert.encoder.layer.{number}.{part}" for number in range(layers) for part in _NORMS]
    for place, (weight, bias) in zip(norms, graph.norms(), strict=True):
        state |= {f"{place}.weight": weight, f"{place}.bias": bias}
    model = classifier_class(shape)(shape)
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return model.eval()


def _export(model: Any, target: Path) -> None:
    import torch

    ids = torch.ones(2, 8, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "texts", 1: "tokens"} for name in names} | {"logits": {0: "texts"}}
    with warnings.catch_warnings(), torch.inference_mode():
        # The exporter's own: tracing, and torch announcing its next exporter.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (ids, ids), str(target), input_names=names, output_names=["logits"], dynamic_axes=axes, dynamo=False
        )


def _quantise(full: Path, small: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(full, small)


class _Graph:
    """The weights that the quantised graph of a bundle holds, as float32."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self._nodes = list(model.graph.node)
        self._constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        self._users: dict[str, list[Any]] = {}
        for node in self._nodes:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def linears(self) -> Iterator[_Linear]:
        """Of each layer query, key, value, and the three that follow; then the classifier."""
        for node in self._nodes:
            if node.op_type == "QAttention":
                weight = self._weight(node.input[1], self._constants[node.input[4]])
                parts = np.split(weight, 3, axis=1), np.split(self._constants[node.input[2]], 3)
                yield from (_Linear(*part) for part in zip(*parts, strict=True))
            elif node.op_type == "MatMulIntegerToFloat":
                weight = self._weight(node.input[1], self._constants[node.input[3]])
                yield _Linear(weight, self._constants[node.input[6]])
            elif node.op_type == "MatMulInteger":
                scaling = self._after(self._after(node))
                by = next(one for one in self._nodes if scaling.input[1] in one.output)
                weight = self._weight(node.input[1], self._constant_of(by))
                yield _Linear(weight, self._constant_of(self._after(scaling)))
            elif node.op_type == "MatMul" and node.input[1] in self._constants:
                yield _Linear(self._constants[node.input[1]], self._constant_of(self._after(node)))

    def embeddings(self) -> dict[str, NDArray[np.float32]]:
        """By their names in the Hugging Face model; none where the graph embeds otherwise."""
        node = next((one for one in self._nodes if one.op_type == "QEmbedLayerNormalization"), None)
        if node is None:
            return {}
        names = (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "LayerNorm.weight",
            "LayerNorm.bias",
        )
        found = {}
        for number, name in enumerate(names):
            values, scale, zero = (self._constants[node.input[at + number]] for at in (2, 8, 13))
            found[name] = (values.astype(np.float32) - np.float32(zero)) * scale
        return found

    def norms(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for node in self._nodes:
            if node.op_type == "LayerNormalization":
                yield self._constants[node.input[1]], self._constants[node.input[2]]

    def heads(self) -> int:
        names = {"num_heads", "q_num_heads"}
        return next((int(one.i) for node in self._nodes for one in node.attribute if one.name in names), 0)

    def _weight(self, name: str, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._constants[name].astype(np.float32) * scale

    def _after(self, node: Any) -> Any:
        (user,) = self._users[node.output[0]]
        return user

    def _constant_of(self, node: Any) -> NDArray[np.float32]:
        return next(self._constants[name] for name in node.input if name in self._constants)
