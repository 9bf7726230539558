"""BentoML: `python -m benchmarks.peers.bentoml.server PORT WORKERS`."""

import os
import sys
from typing import Any

import bentoml

from benchmarks.peers.model import Model

WORKERS = "PEER_WORKERS"


@bentoml.service(workers=int(os.environ.get(WORKERS, "1")), traffic={"timeout": 120})
class Sentiment:
    """One service; BentoML joins the lists of concurrent requests."""

    def __init__(self) -> None:
        self._model = Model()

    @bentoml.api(batchable=True, max_batch_size=256, max_latency_ms=60_000)
    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        return self._model.classify(texts)


if __name__ == "__main__":
    os.environ |= {WORKERS: sys.argv[2], "BENTOML_DO_NOT_TRACK": "True"}
    module = "benchmarks.peers.bentoml.server:Sentiment"
    command = [sys.executable, "-m", "bentoml", "serve", module, "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.execv(sys.executable, command)
