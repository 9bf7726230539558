"""A model whose weights are divided among the workers (FSDP2), and the whole of it again.

Every function is collective: all workers of a run call it at the same point.
"""

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, device_type: str, world: int) -> nn.Module:
    """Divide the weights of `model` in place: each layer of a stack by itself, then what is left."""
    mesh = init_device_mesh(device_type, (world,))
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in (layer for stack in stacks for layer in stack):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The undivided weights on the first worker, nothing on the others."""
    return get_model_state_dict(model, options=_WHOLE)


def whole_moments(model: nn.Module, optimiser: Optimizer) -> dict[str, Any]:
    """The undivided state of `optimiser` on the first worker, nothing on the others."""
    return dict(get_optimizer_state_dict(model, optimiser, options=_WHOLE))


def put_back(model: nn.Module, optimiser: Optimizer, weights: dict[str, Any], moments: dict[str, Any]) -> None:
    """Take in what `whole_weights` and `whole_moments` gave on the first worker, which every worker passes."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimiser, moments, options=options)
