"""One training run on Ray Train: start it, follow the reports, return the chosen checkpoint."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue

from overtone.errors import OvertoneError
from train.config import ClusterConfig, TrainConfig
from train.data import Split
from train.follow import Follow, Forward, following
from train.loop import WEIGHTS
from train.worker import train_loop_per_worker


@dataclass(frozen=True)
class RunSpec:
    """What one run is told besides its configuration."""

    name: str
    """Runs of the same name and storage are one run: a second start resumes the first."""
    split: Split
    storage: str
    """Folder or address where checkpoints go; on a cluster of several machines, one that all of them reach."""
    soft_labels: NDArray[np.float32] | None = None
    """The teachers' probabilities, [training texts, labels]."""


def run_training(config: TrainConfig, spec: RunSpec, follow: Follow, weights: Path) -> dict[str, Any]:
    """Run or resume `spec` on the cluster that this process is connected to.

    Copies the weights of the checkpoint with the best macro-averaged recall into the new folder `weights` and returns
    that checkpoint's metrics. `follow` is called, in another thread, with the metrics of every report.

    Raises:
        OvertoneError: a worker failed for good; the error a worker raised, where it is one of ours.
    """
    values = config.model_dump(mode="json")
    if Path(config.model.name).is_dir():
        # Workers run in a folder of their own.
        values["model"]["name"] = str(Path(config.model.name).absolute())
    reports = Queue(actor_options={"num_cpus": 0})
    callbacks: list[Any] = [Forward(reports)]
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": values,
            # Workers learn no more of the rows than this: the places they came from stay here.
            "split": replace(spec.split, rows=((), ())),
            "soft_labels": spec.soft_labels,
        },
        scaling_config=_scaling(config.cluster),
        run_config=RunConfig(
            name=spec.name,
            storage_path=spec.storage,
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="macro_recall"),
            callbacks=callbacks,
        ),
    )
    with following(reports, follow):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
    return _take_best(result, weights)


def _scaling(cluster: ClusterConfig) -> ScalingConfig:
    resources = ray.cluster_resources()
    most = cluster.max_workers or cluster.workers
    gpu = cluster.gpu if cluster.gpu is not None else resources.get("GPU", 0) >= cluster.workers
    cpus = cluster.cpus_per_worker or _cpus_per_worker(most)
    # Its annotation is that of the older class and knows no bounds.
    workers: Any = (cluster.workers, most) if cluster.max_workers else cluster.workers
    return ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus})


def _cpus_per_worker(workers: int) -> float:
    """What is free now, shared out evenly: replicas on the same cluster keep theirs."""
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1)
    return float(max(min(ray.available_resources().get("CPU", 1) // workers, largest), 1))


def _take_best(result: Any, weights: Path) -> dict[str, Any]:
    candidates = result.best_checkpoints or []
    if not candidates:
        raise OvertoneError("the run ended without a checkpoint")
    checkpoint, metrics = max(candidates, key=lambda pair: pair[1].get("macro_recall", 0.0))
    with checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / WEIGHTS, weights)
    return dict(metrics)


def _cause(error: TrainingFailedError) -> OvertoneError:
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        seen: BaseException | None = failure
        while seen is not None:
            if isinstance(seen, OvertoneError):
                return seen
            seen = getattr(seen, "cause", None) or seen.__cause__
    first = f": {type(failures[0]).__name__}: {failures[0]}" if failures else f": {error}"
    return OvertoneError(f"training failed{first}")
