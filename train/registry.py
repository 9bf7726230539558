"""Putting a bundle into MLflow: as an artifact of its run that MLflow can serve, and as a version of the registry."""

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import overtone
from overtone.bundle import Bundle, load_bundle
from overtone.registry import BUNDLE_FOLDER, BUNDLE_TAG, Alias, Registered, Registry, import_mlflow, mlflow_errors
from overtone.settings import Settings

_REQUIREMENTS = (
    "emoji",
    "numpy",
    "onnxruntime",
    "pandas",
    "prometheus-client",
    "pydantic",
    "pydantic-settings",
    "structlog",
    "tokenizers",
)
"""What the packed code imports; MLflow adds itself."""
_EXAMPLE = ["What a lovely morning!", "The train leaves at noon."]


def log_model(run_id: str, folder: Path) -> str:
    """Keep the bundle in `folder` as the model of the run `run_id`, in the store that MLflow is set to; its address.

    The model holds the code that runs it, so that `mlflow models serve` needs no installed Overtone.

    Raises:
        UnavailableError: MLflow failed.
    """
    mlflow = import_mlflow()
    bundle = load_bundle(folder)
    with tempfile.TemporaryDirectory(prefix="overtone-") as scratch, mlflow_errors("keeping the bundle"):
        artifact = Path(shutil.copytree(folder, Path(scratch) / BUNDLE_FOLDER))
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # The signature is given, and MLflow advises type hints to have it from.
            warnings.simplefilter("ignore")
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("pyfunc.py")),
                artifacts={"bundle": str(artifact)},
                code_paths=[str(_pack_code(Path(scratch)))],
                signature=_signature(bundle),
                input_example=_example(),
                pip_requirements=[
                    f"mlflow=={mlflow.__version__}",
                    *(f"{one}=={version(one)}" for one in _REQUIREMENTS),
                ],
                metadata={BUNDLE_TAG: bundle.version},
            )
    return str(logged.model_uri)


def register(settings: Settings, model_uri: str, run_id: str, folder: Path, tags: Mapping[str, str]) -> Registered:
    """Make the model at `model_uri`, of the bundle in `folder`, a version of the registry and the challenger.

    Raises:
        UnavailableError: MLflow failed.
    """
    mlflow = import_mlflow()
    registry = Registry(settings)
    bundle = load_bundle(folder)
    known = {BUNDLE_TAG: bundle.version, **_figures(bundle.metrics), **tags}
    with mlflow_errors("registering the bundle"):
        found = mlflow.register_model(model_uri, registry.name, tags=known)
    registered = Registered(str(found.version), bundle.version, run_id, ("challenger",), known)
    alias: Alias = "challenger"
    registry.set_alias(alias, registered)
    return registered


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    measured = metrics.get("validation", {})
    return {f"validation_{name}": f"{measured[name]:.4f}" for name in ("macro_recall", "ece") if name in measured}


def _pack_code(scratch: Path) -> Path:
    """The modules of `overtone` that running a bundle needs, in a package of the same name."""
    package = scratch / "code" / "overtone"
    package.mkdir(parents=True)
    for module in Path(overtone.__file__).parent.glob("*.py"):
        shutil.copyfile(module, package / module.name)
    return package


def _signature(bundle: Bundle) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    scores = [ColSpec(DataType.double, name) for name in ("confidence", *bundle.labels)]
    outputs = Schema([ColSpec(DataType.string, "label"), *scores])
    return ModelSignature(Schema([ColSpec(DataType.string, "text")]), outputs)


def _example() -> Any:
    import pandas as pd

    return pd.DataFrame({"text": _EXAMPLE})
