"""Recording a run in MLflow: at `MLFLOW_TRACKING_URI`, or in a SQLite file and a folder of the home.

With `WANDB_API_KEY` set, metrics go to Weights & Biases too.
"""

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import overtone
from overtone.errors import ConfigurationError, EnvironmentProblemError
from overtone.logging import get_logger
from overtone.registry import (
    Registered,
    artifact_location,
    import_mlflow,
    is_in_use,
    local_store,
    mlflow_errors,
    tracking_uri,
)
from overtone.settings import Settings
from train import registry
from train.config import AblationStep, TrainConfig

_MAX_PARAM_CHARS = 500
_PARAMS_A_CALL = 100
"""What MLflow takes."""
_FINISHED = "FINISHED"
_BUNDLE_RECALL = "bundle_macro_recall"
"""Metric of a run that `python -m train` records of the exported bundle."""


class Tracker:
    """Takes what a run reports. Threads may share one."""

    def __init__(self, settings: Settings, mlflow: Any, run_id: str, wandb: Any = None) -> None:
        self._settings = settings
        self._client = mlflow.MlflowClient()
        self._entities = mlflow.entities
        self.run_id = run_id
        self._wandb = wandb
        self._lost = 0

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Take the numbers among `values`, as of `step`. What cannot be recorded is given up with a warning."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        now = int(time.time() * 1000)
        try:
            rows = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
            self._client.log_batch(self.run_id, metrics=rows)
            if self._wandb is not None:
                self._wandb.log(numbers, step=step)
        except Exception as error:  # a run of hours must not end because a server is away
            self._lost += 1
            if self._lost == 1:
                get_logger().warning("train.metrics_not_recorded", reason=type(error).__name__)

    def tags(self, values: Mapping[str, str]) -> None:
        """Put `values` on the run.

        Raises:
            UnavailableError: MLflow failed.
        """
        with mlflow_errors("tagging the run"):
            for name, value in values.items():
                self._client.set_tag(self.run_id, name, value)

    def files(self, folder: Path, name: str) -> None:
        """Keep the files in `folder` under `name`.

        Raises:
            UnavailableError: MLflow failed.
        """
        with mlflow_errors(f"keeping {name}"):
            self._client.log_artifacts(self.run_id, str(folder), name)

    def bundle(self, folder: Path, *, as_challenger: bool) -> Registered | None:
        """Keep the finished bundle in `folder`; as a new version of the registry, the challenger, if so asked.

        Raises:
            UnavailableError: MLflow failed.
        """
        address = registry.log_model(self.run_id, folder)
        if not as_challenger:
            return None
        return registry.register(self._settings, address, self.run_id, folder, provenance())


@contextmanager
def tracked_run(settings: Settings, config: TrainConfig, name: str) -> Iterator[Tracker]:
    """Record the block as the run `name`; an exception in it marks the run as failed.

    An unfinished run of the same name is continued, as the training itself is.

    Raises:
        EnvironmentProblemError: MLflow, or Weights & Biases while it is asked for, is not installed.
        UnavailableError: MLflow failed.
    """
    mlflow = import_mlflow()
    wandb = _import_wandb(settings)
    if not settings.mlflow_tracking_uri:
        local_store(settings.home).mkdir(parents=True, exist_ok=True, mode=0o700)
    with mlflow_errors("opening the run"):
        # For `train.registry.log_model`, which only exists in the form that reads them.
        mlflow.set_tracking_uri(tracking_uri(settings))
        mlflow.set_registry_uri(tracking_uri(settings))
        client = mlflow.MlflowClient()
        run_id = _open_run(client, _experiment(client, settings), name)
        params = flatten(config.model_dump(mode="json", exclude={"card": True, "export": {"golden"}}))
        _log_new_params(client, mlflow.entities.Param, run_id, params)
    noted = _start_wandb(wandb, settings, name, params) if wandb else None
    status = "FAILED"
    try:
        yield Tracker(settings, mlflow, run_id, noted)
        status = _FINISHED
    finally:
        with mlflow_errors("closing the run"):
            client.set_terminated(run_id, status)
        if noted is not None:
            noted.finish(exit_code=0 if status == _FINISHED else 1)


def ablation(settings: Settings, steps: Sequence[AblationStep]) -> list[dict[str, Any]]:
    """`step` and `macro_recall` of each of `steps`, taken from the finished runs that they name.

    Raises:
        ConfigurationError: there is no such run, or it has measured no bundle.
        UnavailableError: MLflow failed.
    """
    return [
        {"step": one.step, "macro_recall": one.macro_recall if one.run is None else _measured(settings, one.run)}
        for one in steps
    ]


def _measured(settings: Settings, name: str) -> float:
    # Looking for a run must not make a store to look in.
    if is_in_use(settings):
        mlflow, where = import_mlflow(), tracking_uri(settings)
        with mlflow_errors("looking for a run"):
            client = mlflow.MlflowClient(where, where)
            found = client.get_experiment_by_name(settings.mlflow_experiment_name)
            wanted = f"attributes.run_name = '{name}' and attributes.status = '{_FINISHED}'"
            runs = client.search_runs([found.experiment_id], wanted, max_results=1) if found else []
        for run in runs:
            if _BUNDLE_RECALL in run.data.metrics:
                return float(run.data.metrics[_BUNDLE_RECALL])
    raise ConfigurationError(f"card.ablation: MLflow has no finished run {name!r} with a measured bundle")


def provenance() -> dict[str, str]:
    """Which code runs: `overtone_version`, and `git_commit` where the code is in a repository."""
    commit = _git_commit()
    return {"overtone_version": overtone.__version__, **({"git_commit": commit} if commit else {})}


def _git_commit() -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def _experiment(client: Any, settings: Settings) -> str:
    name = settings.mlflow_experiment_name
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name, artifact_location(settings)))


def _open_run(client: Any, experiment: str, name: str) -> str:
    found = client.search_runs([experiment], f"attributes.run_name = '{name}'", max_results=1)
    if found and found[0].info.status != _FINISHED:
        run_id = str(found[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = str(client.create_run(experiment, run_name=name).info.run_id)
    for key, value in {**provenance(), "mlflow.source.name": "python -m train"}.items():
        client.set_tag(run_id, key, value)
    return run_id


def _log_new_params(client: Any, param: Any, run_id: str, params: Mapping[str, Any]) -> None:
    """MLflow refuses to change a parameter of a run; a continued one keeps those it began with."""
    known = client.get_run(run_id).data.params
    rows = [param(name, str(value)[:_MAX_PARAM_CHARS]) for name, value in params.items() if name not in known]
    for start in range(0, len(rows), _PARAMS_A_CALL):
        client.log_batch(run_id, params=rows[start : start + _PARAMS_A_CALL])


def _import_wandb(settings: Settings) -> Any:
    if settings.wandb_api_key is None:
        return None
    try:
        import wandb
    except ImportError:
        raise EnvironmentProblemError(
            "WANDB_API_KEY is set and wandb is not installed: pip install wandb, or unset WANDB_API_KEY"
        ) from None
    return wandb


def _start_wandb(wandb: Any, settings: Settings, name: str, params: Mapping[str, Any]) -> Any:
    assert settings.wandb_api_key is not None
    wandb.login(key=settings.wandb_api_key.get_secret_value())
    return wandb.init(project=settings.wandb_project, name=name, id=name, resume="allow", config=dict(params))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested `values` under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
