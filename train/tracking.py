"""Recording a run in MLflow, when `MLFLOW_TRACKING_URI` says where."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overtone.errors import EnvironmentProblemError
from overtone.settings import Settings
from train.config import TrainConfig


class Tracker:
    """Takes what a run reports. This one keeps nothing."""

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Take the numbers among `values`, as of `step`."""

    def bundle(self, folder: Path) -> None:
        """Take the finished bundle in `folder`."""


class _MlflowTracker(Tracker):
    def __init__(self, mlflow: Any) -> None:
        self._mlflow = mlflow

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        self._mlflow.log_metrics(numbers, step=step)

    def bundle(self, folder: Path) -> None:
        self._mlflow.log_artifacts(str(folder), artifact_path="bundle")


@contextmanager
def tracked_run(settings: Settings, config: TrainConfig, name: str) -> Iterator[Tracker]:
    """Record the block as the run `name`; an exception in it marks the run as failed.

    Raises:
        EnvironmentProblemError: MLflow is asked for and not installed.
    """
    if settings.mlflow_tracking_uri is None:
        yield Tracker()
        return
    try:
        import mlflow
    except ImportError:
        raise EnvironmentProblemError(
            "MLFLOW_TRACKING_URI is set and MLflow is not installed: pip install mlflow-skinny (with a server), "
            "pip install mlflow (with a folder or database), or unset MLFLOW_TRACKING_URI"
        ) from None
    mlflow.set_tracking_uri(settings.mlflow_tracking_uri)
    mlflow.set_experiment(settings.mlflow_experiment_name)
    with mlflow.start_run(run_name=name):
        mlflow.log_params(flatten(config.model_dump(mode="json", exclude={"card": True, "export": {"golden"}})))
        yield _MlflowTracker(mlflow)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested `values` under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
