"""Two workers that share their gradients, each in a process of its own, against one that has all texts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as processes
from torch import nn

from train.config import TrainConfig
from train.data import LabelledTexts, Split
from train.loop import Run, alone

LABELS = np.arange(24) % 3
TEXTS = LabelledTexts(
    tuple(f"{('awful', 'table', 'lovely')[label]} thing {row}" for row, label in enumerate(LABELS)), LABELS
)


def shared(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def trained(rank: int, world: int, encoder: Path, kept: Path, parts: int) -> None:
    """Train as worker `rank` of `world` and keep the weights in `kept`."""
    values = {
        "name": "tiny",
        "model": {
            "name": str(encoder),
            "precision": "fp32",
            "pooling": "mean",
            "dropout": 0.0,
            "classifier_dropout": 0.0,
        },
        "optimiser": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "evaluations": 1, "accumulate": parts},
    }
    place = replace(alone(lambda _metrics, _folder: None), rank=rank, world=world)
    if world > 1:
        place = replace(place, prepare=shared)
        torch.distributed.init_process_group("gloo", init_method=f"file://{kept}/meeting", rank=rank, world_size=world)
    run = Run(TrainConfig.model_validate(values), Split(TEXTS, TEXTS, 0), None, place)
    run.train()
    torch.save(run.bare.state_dict(), kept / f"{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def weights(kept: Path, rank: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = torch.load(kept / f"{rank}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_two_workers_end_with_the_weights_of_one(tiny_encoder: Path, tmp_path: Path, parts: int) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    trained(0, 1, tiny_encoder, one, parts)
    processes.spawn(trained, args=(2, tiny_encoder, two, parts), nprocs=2)

    first, second, expected = weights(two, 0), weights(two, 1), weights(one, 0)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], value, rtol=0, atol=1e-4)
