"""What Ray Train runs on every worker: the training loop, told by Ray where it stands."""

from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from train.config import TrainConfig
from train.data import read_split
from train.loop import Place, Run


def train_loop_per_worker(values: dict[str, Any]) -> None:
    """Fine-tune, evaluate and checkpoint. `values`: `config` (a `TrainConfig`), `train` and `validation` (paths),
    `soft_labels` (probabilities, float32 [training texts, labels], or None)."""
    context = ray.train.get_context()
    config = TrainConfig.model_validate(values["config"])
    split = read_split(Path(values["train"]), Path(values["validation"]), config.data.labels)
    place = Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        report=_report,
        prepare=lambda model: ray.train.torch.prepare_model(model, move_to_device=False),
    )
    run = Run(config, split, values["soft_labels"], place)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            run.resume(Path(folder))
    run.train()


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
    ray.train.report(metrics, checkpoint=checkpoint)
