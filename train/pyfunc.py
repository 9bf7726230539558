"""The code of a bundle as an MLflow model: MLflow keeps a copy of this file beside the bundle and runs that.

Takes a column `text` (or a list of strings) and gives, for each, `label`, `confidence` and one column a label with its
score. Imports nothing of this package beyond what `train.registry` packs with it.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from overtone.bundle import TextEncoder, load_bundle, to_prediction
from overtone.engine import classify_sorted, open_engine


class BundleModel(PythonModel):
    """Classifies texts with the bundle among the model's artifacts."""

    def load_context(self, context: Any) -> None:
        """Open the bundle."""
        from pathlib import Path

        self._bundle = load_bundle(Path(context.artifacts["bundle"]))
        self._encoder = TextEncoder(self._bundle)
        self._engine = open_engine(self._bundle)

    # MLflow would read type hints as the schema of the input.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """One row a text, in the order given."""
        texts = list(model_input["text"] if isinstance(model_input, pd.DataFrame) else model_input)
        if not texts:
            return pd.DataFrame(columns=["label", "confidence", *self._bundle.labels])
        rows = classify_sorted(self._engine, self._encoder.encode(texts))
        found = [to_prediction(self._bundle, row) for row in rows]
        return pd.DataFrame([{"label": one.label, "confidence": one.confidence, **one.scores} for one in found])


set_model(BundleModel())
