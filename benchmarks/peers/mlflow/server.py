"""`mlflow models serve`: `python -m benchmarks.peers.mlflow.server PORT WORKERS`."""

import os
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas

from benchmarks.peers.model import Model


class Sentiment(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pyfunc model; MLflow joins no requests."""

    def load_context(self, context: Any) -> None:
        self._model = Model()

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> list[dict[str, Any]]:
        return self._model.classify(model_input["text"].tolist())


if __name__ == "__main__":
    from benchmarks.peers.mlflow import server  # so that the model is stored by the module's name, not as __main__'s

    folder = Path.cwd() / "model"
    mlflow.pyfunc.save_model(folder, python_model=server.Sentiment(), pip_requirements=["mlflow"])
    program = str(Path(sys.executable).parent / "mlflow")
    options = ["--model-uri", str(folder), "--host", "127.0.0.1", "--port", sys.argv[1], "--workers", sys.argv[2]]
    os.execv(program, [program, "models", "serve", *options, "--env-manager", "local"])
