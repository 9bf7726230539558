"""What Ray Train runs on every worker: the training loop, told by Ray where it stands."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.report_config import CheckpointUploadMode
from torch import nn

from train.config import TrainConfig
from train.loop import Place, Run


def train_loop_per_worker(values: dict[str, Any]) -> None:
    """Fine-tune, evaluate and checkpoint. `values`: `config` (a `TrainConfig`), `split` (a `Split`),
    `soft_labels` (probabilities, float32 [training texts, labels], or None)."""
    context = ray.train.get_context()
    _use_assigned_cores()
    config = TrainConfig.model_validate(values["config"])
    world, device = context.get_world_size(), ray.train.torch.get_device()
    sharded = config.cluster.sharding == "shard"

    def prepare(model: nn.Module) -> nn.Module:
        if sharded:
            from train.sharding import shard

            return shard(model, device.type, world)
        # Gradients then lie where workers exchange them, and are not copied there and back: a tenth of a step on a CPU.
        prepared: nn.Module = ray.train.torch.prepare_model(
            model, move_to_device=False, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
        )
        return prepared

    place = Place(context.get_world_rank(), world, device, _report, prepare, sharded=sharded)
    run = Run(config, values["split"], values["soft_labels"], place)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            run.resume(Path(folder))
    run.train()


def _use_assigned_cores() -> None:
    """Compute on as many threads as the worker has CPUs: where replicas run too, OMP_NUM_THREADS is 1 for all."""
    cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    if cores:
        torch.set_num_threads(cores)


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    if folder is None:
        ray.train.report(metrics)
        return
    # Training goes on while the checkpoint is uploaded, and the loop's own folder is gone as soon as this returns.
    kept = Path(tempfile.mkdtemp(prefix="overtone-"))
    for part in folder.iterdir():
        shutil.move(part, kept / part.name)
    checkpoint = ray.train.Checkpoint.from_directory(kept)
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
