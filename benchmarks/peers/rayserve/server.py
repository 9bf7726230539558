"""Ray Serve as its documentation shows it: `python -m benchmarks.peers.rayserve.server PORT WORKERS`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.model import Model


# Ray's guide to dynamic batching asks for at least `max_batch_size` ongoing requests a replica; the default is 5.
@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
class Sentiment:
    """One deployment behind the default proxy; `@serve.batch` joins texts."""

    def __init__(self) -> None:
        self._model = Model()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)  # type: ignore[untyped-decorator]
    async def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        return self._model.classify(texts)

    async def __call__(self, request: Request) -> dict[str, Any]:
        texts = (await request.json())["texts"]
        return {"predictions": await asyncio.gather(*map(self.classify, texts))}


if __name__ == "__main__":
    workers = int(sys.argv[2])
    # A cluster of one machine and one run, which only loopback reaches.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    # The proxy and the controller ask for no processor, so the replicas may have all.
    ray.init(address="local", num_cpus=workers, include_dashboard=False, _temp_dir=str(Path.cwd()))
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Sentiment.options(num_replicas=workers).bind(), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()
