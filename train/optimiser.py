"""The pieces of plain PyTorch that the training loop puts together: loss, parameter groups, schedule."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overtone.hardware import has_fast_bf16, read_cpu_features
from train.config import OptimiserConfig

_LAYER = re.compile(r"\.layers?\.(\d+)\.")
_UNDECAYED = re.compile(r"(?:bias|LayerNorm\.weight|layer_norm\.weight|norm\.weight)$")


def usable_device() -> torch.device:
    """A GPU where there is one, for what runs in this process alone."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products_in(precision: Literal["bf16", "fp32"], device: torch.device) -> torch.autocast:
    """Matrix products in `precision`; in float32 on processors that would emulate bf16, at a seventh of the speed."""
    multiplies_bf16 = device.type != "cpu" or has_fast_bf16(read_cpu_features())
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and multiplies_bf16)


def trained_attention(device: torch.device) -> str | None:
    """The kernel of attention to train with on `device`, by the name Transformers has for it; None for its own choice.

    The backward pass of the fused one takes eight times as long on a CPU in bf16, for 28 tokens a text, as that of
    attention written out.
    """
    return "eager" if device.type == "cpu" else None


def make_loss(
    config: OptimiserConfig, log_prior: Tensor, soft_weight: float = 0.0
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Cross-entropy of (logits [rows, labels], labels [rows]) with the class prior added to the logits.

    With `rdrop` the logits are [2 rows, labels]: of a second pass under another dropout after the first.
    A third argument holds the teachers' probabilities [rows, labels]: `soft_weight` of the loss is against them.

    The sum belongs to the loss alone: the model learns what is left when the prior is known, so that its own logits
    treat all labels as equally likely beforehand (Menon et al. 2021, "Long-tail learning via logit adjustment").
    """

    def loss(logits: Tensor, labels: Tensor, soft: Tensor | None) -> Tensor:
        adjusted = logits.float() + config.prior_tau * log_prior
        if config.rdrop:
            labels = labels.repeat(2)
            soft = None if soft is None else soft.repeat(2, 1)
        total = nn.functional.cross_entropy(adjusted, labels, label_smoothing=config.label_smoothing)
        if soft is not None:
            total = (1 - soft_weight) * total + soft_weight * nn.functional.cross_entropy(adjusted, soft)
        if config.rdrop:
            total = total + config.rdrop * _disagreement(*adjusted.chunk(2))
        return total

    return loss


def _disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Mean symmetric Kullback-Leibler divergence of the labels of two passes, logits [rows, labels] each.

    Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".
    """
    p, q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=-1).mean() / 2


def make_mixout(model: nn.Module, chance: float) -> Callable[[], dict[str, Tensor]]:
    """What gives the weights of each pass: the matrices of numbered layers, by name, mixed with what they are now.

    An element falls back to what it is now with probability `chance`; the others go beyond their trained value by so
    much that the mean is that value. Gradients reach the parameters of `model`.
    Lee et al. 2020, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models".
    """
    mixed = {name: one for name, one in model.named_parameters() if one.ndim > 1 and _LAYER.search(name)}
    before = {name: one.detach().clone() for name, one in mixed.items()}

    def draw() -> dict[str, Tensor]:
        # The paper's formula, written as dropout of what training has changed.
        return {
            name: before[name] + nn.functional.dropout(one - before[name], chance, training=True)
            for name, one in mixed.items()
        }

    return draw


class UsedRows:
    """Has a model on a CPU make gradients of those rows of its word embeddings alone that a batch used.

    The embeddings are half of a small encoder's parameters, and a batch uses one row in a hundred. So the others are
    neither allocated anew (some 10,000 page faults a step), nor looked at for their norm, nor sent to other workers,
    among whom Gloo alone can add up such gradients. To be made before the model shares its gradients.
    """

    def __init__(self, model: Any) -> None:
        """`model`: a Transformers model."""
        embeddings = model.get_input_embeddings()
        embeddings.sparse = True
        self._model = model
        self._weight = embeddings.weight
        self._all = torch.zeros_like(self._weight)
        self._filled: Tensor | None = None

    def clip(self, max_norm: float) -> None:
        """Clip all gradients of a backward pass, and then write out those of all rows: AdamW's moments fade in each."""
        gradient = self._weight.grad
        if gradient is None or not gradient.is_sparse:
            nn.utils.clip_grad_norm_(self._model.parameters(), max_norm)
            return
        gradient = gradient.coalesce()
        used = nn.Parameter(gradient.values())
        used.grad = gradient.values()
        nn.utils.clip_grad_norm_(
            [*(one for one in self._model.parameters() if one is not self._weight), used], max_norm
        )
        if self._filled is not None:
            self._all.index_fill_(0, self._filled, 0)
        self._filled = gradient.indices()[0]
        self._all.index_copy_(0, self._filled, gradient.values())
        self._weight.grad = self._all


def parameter_groups(model: nn.Module, config: OptimiserConfig) -> list[dict[str, Any]]:
    """Parameters of `model` grouped by depth and by weight decay.

    The head, and whatever lies in no numbered layer, learns at the rate of the head; the topmost layer at `layer_decay`
    of the full rate, and so on down to the embeddings. Biases and normalisation weights are not decayed.
    """
    layers = 1 + max(
        (int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name))), default=-1
    )
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = _depth(name, layers), _UNDECAYED.search(name) is None
        groups.setdefault(key, []).append(parameter)
    head = config.head_learning_rate or config.learning_rate
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * config.layer_decay**depth if depth else head,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (depth, decayed), parameters in groups.items()
    ]


def _depth(name: str, layers: int) -> int:
    if found := _LAYER.search(name):
        return layers - int(found[1])
    # Position biases that all layers share (MPNet, T5) are as general as the embeddings.
    return layers + 1 if "embeddings" in name or "attention_bias" in name else 0


def learning_rate_factor(config: OptimiserConfig, total_steps: int) -> Callable[[int], float]:
    """The share of the peak learning rate at each step: up from 0 during the warm-up, then down to 0."""
    warmup = max(round(config.warmup * total_steps), 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = max(total_steps - step, 0) / max(total_steps - warmup, 1)
        return left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    return factor


def make_average(model: nn.Module, config: OptimiserConfig) -> torch.optim.swa_utils.AveragedModel | None:
    """The running average of the weights, or None when it is switched off."""
    if not config.ema_decay:
        return None
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
