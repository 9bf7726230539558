"""Quantisation-aware training: layers compute with what int8 export will make of their weights and inputs.

Rounding in the forward pass lets the weights settle where it costs least; gradients pass it as if it were not there
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference").
What is rounded, and how, is what `train.export` does: weights by the output channel, inputs by one scale a layer that
is measured on training texts. The head, which sees one vector a text, is left alone, and so are the embeddings.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.calibrate import best_scale
from train.graph import Scale

_MOST = 127
_LEAST = 1e-12
"""What is smaller counts as zero, whose step would be one that nothing can be divided by."""


class Rounding:
    """The scales of the layers' inputs, by name, for all models of one architecture that are attached."""

    def __init__(self, *models: nn.Module) -> None:
        self._scales: dict[str, Scale] = {}
        for model in models:
            for name, layer in _layers(model):
                # In place of the class's own: parameters keep their names, whatever else wraps or copies them.
                layer.forward = partial(self._forward, name, layer)  # type: ignore[method-assign]

    @torch.no_grad()
    def measure(self, model: nn.Module, passes: Iterable[Callable[[], Any]]) -> None:
        """Measure the scales on the inputs that the layers of `model` get in `passes`, each of one text, unrounded."""
        self._scales = {}
        seen = _Inputs()
        hooks = [layer.register_forward_pre_hook(partial(seen.add, name)) for name, layer in _layers(model)]
        training = model.training
        model.eval()
        try:
            for run in passes:
                seen.begin()
                run()
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        self._scales = seen.scales()

    def _forward(self, name: str, layer: nn.Linear, values: Tensor) -> Tensor:
        scale = self._scales.get(name)
        if scale is None:
            return nn.functional.linear(values, layer.weight, layer.bias)
        rounded: Tensor = _RoundInputs.apply(values.float(), scale)  # type: ignore[no-untyped-call]
        return nn.functional.linear(rounded, round_weight(layer.weight), layer.bias)


def round_weight(weight: Tensor) -> Tensor:
    """`weight`, [outputs, inputs], as int8 with one scale an output would hold it, in float32."""
    rounded: Tensor = _RoundWeight.apply(weight)  # type: ignore[no-untyped-call]
    return rounded


# Torch has these two as `fake_quantize_per_channel_affine` and `fake_quantize_per_tensor_affine`, which take five to
# ten times as long on a CPU.


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, weight: Tensor) -> Tensor:
        steps = weight.abs().amax(dim=1, keepdim=True).clamp_(min=_LEAST).div_(_MOST)
        return (weight / steps).round_().mul_(steps)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient


class _RoundInputs(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, scale: Scale) -> Tensor:
        lowest, highest = -scale.zero, 255 - scale.zero
        context.save_for_backward(values)
        context.range = lowest * scale.step, highest * scale.step
        return (values / scale.step).round_().clamp_(lowest, highest).mul_(scale.step)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = context.saved_tensors
        lowest, highest = context.range
        # What is cut off at the ends of the scale does not change with its value.
        return gradient * ((values >= lowest) & (values <= highest)), None


class _Inputs:
    """What each layer was given. Layers that are given the same tensor share a scale, which is then found once."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._same: dict[str, str] = {}
        self._now: dict[int, tuple[str, Tensor]] = {}

    def begin(self) -> None:
        """Another pass begins; tensors of the last one are gone, and their ids with them."""
        self._now = {}

    def add(self, name: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input of the layer `name`, [1, tokens, width]; one vector a text is what a head sees."""
        (values,) = args
        if values.ndim != 3:
            return
        first, _ = self._now.setdefault(id(values), (name, values))
        self._same[name] = first
        if first == name:
            self._values.setdefault(name, []).append(values.float().flatten().cpu())

    def scales(self) -> dict[str, Scale]:
        """The scale of each layer that was given tokens."""
        found = {name: best_scale(torch.cat(parts).numpy()) for name, parts in self._values.items()}
        return {name: found[first] for name, first in self._same.items()}


def _layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
