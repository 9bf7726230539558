"""LitServe: `python -m benchmarks.peers.litserve.server PORT WORKERS`."""

import sys
from typing import Any

import litserve

from benchmarks.peers.model import Model


class Sentiment(litserve.LitAPI):  # type: ignore[misc]
    """Requests of one text or several, joined by LitServe and classified together."""

    def setup(self, device: str) -> None:
        self._model = Model()

    def decode_request(self, request: dict[str, Any]) -> list[str]:
        texts: list[str] = request["texts"]
        return texts

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, batch: list[list[str]]) -> list[list[dict[str, Any]]]:
        answers = iter(self._model.classify([text for texts in batch for text in texts]))
        return [[next(answers) for _ in texts] for texts in batch]

    def unbatch(self, output: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        return output

    def encode_response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {"predictions": output}


if __name__ == "__main__":
    server = litserve.LitServer(
        Sentiment(max_batch_size=32, batch_timeout=0.01),
        accelerator="cpu",
        workers_per_device=int(sys.argv[2]),
        timeout=120,
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
