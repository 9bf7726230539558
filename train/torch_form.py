"""The torch form of a trained classifier: its weights under the names that `overtone.torch_engine` reads.

Known are BERT and what is built like it: absolute positions, and norms after what layers add up to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overtone.errors import OvertoneError
from overtone.torch_form import TORCH_CONFIG_FILE, TORCH_WEIGHTS_FILE, Activation, TorchForm

Weights = Mapping[str, Any]

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_COUNT_POSITIONS_FROM_PADDING = frozenset({"roberta", "xlm-roberta", "camembert"})


@dataclass(frozen=True, slots=True)
class _Names:
    """What an architecture calls the parts of a layer."""

    layer: str
    query: str
    key: str
    value: str
    out: str
    first_norm: str
    up: str
    down: str
    second_norm: str


_BERT = _Names(
    layer="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    first_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    second_norm="output.LayerNorm",
)
_DISTILBERT = _Names(
    layer="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    first_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    second_norm="output_layer_norm",
)
_KNOWN: Mapping[str, _Names] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
}


def torch_form_of(model: Any, golden: tuple[tuple[float, ...], ...]) -> tuple[TorchForm, Weights]:
    """The form of the Hugging Face classifier `model`, of temperature 1 and with the scores `golden`, and its weights.

    Raises:
        OvertoneError: the engine on torch knows no model like it.
    """
    shape = model.config
    names = _KNOWN.get(shape.model_type)
    activation = _ACTIVATIONS.get(str(getattr(shape, "hidden_act", getattr(shape, "activation", ""))))
    if names is None or activation is None or getattr(shape, "position_embedding_type", "absolute") != "absolute":
        raise OvertoneError(
            f"export.torch: models of type {shape.model_type} with these options have no torch form; known are "
            f"{', '.join(_KNOWN)} with absolute positions and {', '.join(_ACTIVATIONS)}; set export.torch=false"
        )
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    weights = _embeddings(model, state)
    for number in range(shape.num_hidden_layers):
        weights |= _layer(state, f"{model.base_model_prefix}.{names.layer}.{number}", f"layers.{number}", names)
    head, dense, last = _head(model, state)
    weights |= _part(state, last, "head.last")
    if dense:
        weights |= _part(state, dense, "head.dense")
    form = TorchForm(
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        activation=activation,
        epsilon=getattr(shape, "layer_norm_eps", 1e-12),
        pooling="mean" if getattr(shape, "pooling", "cls") == "mean" else "first",
        head=head,
        temperature=1.0,
        golden=golden,
    )
    return form, {name: value.contiguous().clone() for name, value in weights.items()}


def write_torch_form(folder: Path, form: TorchForm, weights: Weights | None = None) -> None:
    """Write the files of `form` into the bundle `folder`; without `weights` those that are there stay."""
    from safetensors.torch import save_file

    (folder / TORCH_CONFIG_FILE).parent.mkdir(exist_ok=True)
    if weights is not None:
        save_file(dict(weights), folder / TORCH_WEIGHTS_FILE)
    (folder / TORCH_CONFIG_FILE).write_text(form.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _embeddings(model: Any, state: Weights) -> dict[str, Any]:
    place = f"{model.base_model_prefix}.embeddings"
    positions = state[f"{place}.position_embeddings.weight"]
    if model.config.model_type in _COUNT_POSITIONS_FROM_PADDING:
        positions = positions[model.config.pad_token_id + 1 :]
    # Every token is of the first segment.
    types = state.get(f"{place}.token_type_embeddings.weight")
    found = {
        "embed.words.weight": state[f"{place}.word_embeddings.weight"],
        "embed.positions.weight": positions if types is None else positions + types[0],
        **_part(state, f"{place}.LayerNorm", "embed.norm"),
    }
    project = f"{model.base_model_prefix}.embeddings_project"
    return {**found, **(_part(state, project, "embed.project") if f"{project}.weight" in state else {})}


def _layer(state: Weights, source: str, target: str, names: _Names) -> dict[str, Any]:
    import torch

    found = {
        f"{target}.qkv.{kind}": torch.cat(
            [state[f"{source}.{one}.{kind}"] for one in (names.query, names.key, names.value)]
        )
        for kind in ("weight", "bias")
    }
    for part in ("out", "first_norm", "up", "down", "second_norm"):
        found |= _part(state, f"{source}.{getattr(names, part)}", f"{target}.{part}")
    return found


def _head(model: Any, state: Weights) -> tuple[Activation | None, str, str]:
    """What is between two layers, the first of them if there are two, and the last."""
    if getattr(model.config, "pooling", "cls") == "mean":
        return None, "", "classifier"
    if "classifier.dense.weight" in state:
        return ("gelu" if model.config.model_type == "electra" else "tanh"), "classifier.dense", "classifier.out_proj"
    if "pre_classifier.weight" in state:
        return "relu", "pre_classifier", "classifier"
    return "tanh", f"{model.base_model_prefix}.pooler.dense", "classifier"


def _part(state: Weights, source: str, target: str) -> dict[str, Any]:
    return {f"{target}.{kind}": state[f"{source}.{kind}"] for kind in ("weight", "bias")}
