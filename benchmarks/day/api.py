"""The API of a day, in one process: `python -m benchmarks.day.api PORT SHARE`.

The product's own application, batcher and default bundle. A share of the texts, always the same ones, goes through the
model; the rest through an engine without one, so that a day of a million posts fits into half an hour of two cores.
"""

import asyncio
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import uvicorn

from overtone.bundle import Bundle, TextEncoder
from overtone.engine import Engine, Probabilities, open_engine
from overtone.logging import configure
from overtone.settings import Settings, load_settings
from serve.auth import Gate, KeyRing
from serve.classifier import Classifier
from serve.http import create_app
from serve.service import Service
from serve.store import Store

STAND_IN_CONFIDENCE = 0.625
"""Of every prediction that no model made; a model's never is just this."""

_PARTS = 10_000


class MixedEngine:
    """The engine of a bundle for `share` of the texts, and for those that check the bundle; the rest get one answer."""

    def __init__(self, bundle: Bundle, threads: int, share: float) -> None:
        self._real: Engine = open_engine(bundle, threads)
        self.labels = self._real.labels
        self._parts = round(share * _PARTS)
        self._golden = set(map(_key, TextEncoder(bundle).encode([golden.text for golden in bundle.golden])))
        rest = (1.0 - STAND_IN_CONFIDENCE) / (self.labels - 1)
        self._answer = np.full(self.labels, rest, dtype=np.float32)
        self._answer[0] = STAND_IN_CONFIDENCE

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        """See `Engine.classify`."""
        scores = np.tile(self._answer, (len(token_ids), 1))
        real = [number for number, ids in enumerate(token_ids) if self._is_real(ids)]
        if real:
            scores[real] = self._real.classify([token_ids[number] for number in real])
        return scores

    def close(self) -> None:
        """See `Engine.close`."""
        self._real.close()

    def _is_real(self, ids: Sequence[int]) -> bool:
        key = _key(ids)
        return key % _PARTS < self._parts or key in self._golden


def _key(ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())


async def _serve(settings: Settings, port: int, share: float) -> None:
    assert settings.database_url is not None
    store = Store(settings.database_url.get_secret_value())
    classifier = Classifier(engine_for=lambda bundle, threads: MixedEngine(bundle, threads, share))
    await classifier.load(settings.bundle)
    keys = KeyRing(store)
    await keys.refresh()
    gate = Gate(keys, api_key_header=settings.api_key_header)
    fresh = asyncio.create_task(gate.keep_fresh())
    app = create_app(Service(classifier=classifier, gate=gate, records=store))
    await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off")).serve()
    fresh.cancel()


if __name__ == "__main__":
    loaded = load_settings()
    configure("api", loaded.log_level)
    asyncio.run(_serve(loaded, int(sys.argv[1]), float(sys.argv[2])))
