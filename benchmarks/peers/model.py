"""What the peers' servers run: the bundle as Overtone itself runs it, so that only the serving differs.

Imported in the peers' own environments: needs what is in their requirements, nothing of Ray.
"""

from dataclasses import asdict
from typing import Any

from overtone.bundle import TextEncoder, load_bundle, to_prediction
from overtone.engine import open_engine
from overtone.settings import load_settings

BATCH_TEXTS = 32
"""Texts the model is given at once, in order of arrival: the usual batch of the peers' documentations."""


class Model:
    """One worker's model, on one thread."""

    def __init__(self) -> None:
        """Load the bundle that BUNDLE names, or the default one."""
        self._bundle = load_bundle(load_settings().bundle)
        self._encoder = TextEncoder(self._bundle)
        self._engine = open_engine(self._bundle, 1)

    def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        """The prediction of each text."""
        answers: list[dict[str, Any]] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            rows = self._engine.classify(self._encoder.encode(texts[start : start + BATCH_TEXTS]))
            answers += [asdict(to_prediction(self._bundle, row)) for row in rows]
        return answers
