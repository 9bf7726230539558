"""MLServer with a runtime of our own: `python -m benchmarks.peers.mlserver.server PORT WORKERS`."""

import json
import os
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.model import Model


class Sentiment(MLModel):  # type: ignore[misc]
    """Tensors of texts in, tensors of labels and scores out."""

    async def load(self) -> bool:
        self._model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        answers = self._model.classify(StringCodec.decode_input(payload.inputs[0]))
        scores = np.array([list(answer["scores"].values()) for answer in answers], dtype=np.float32)
        return InferenceResponse(
            model_name=self.name,
            outputs=[
                StringCodec.encode_output("label", [answer["label"] for answer in answers]),
                NumpyCodec.encode_output("scores", scores),
            ],
        )


if __name__ == "__main__":
    port = int(sys.argv[1])
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": port + 1,
        "metrics_port": port + 2,
        "parallel_workers": int(sys.argv[2]),
    }
    model = {
        "name": "sentiment",
        "implementation": "benchmarks.peers.mlserver.server.Sentiment",
        "max_batch_size": 32,
        "max_batch_time": 0.01,
    }
    Path("settings.json").write_text(json.dumps(settings), encoding="utf-8")
    Path("model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    program = str(Path(sys.executable).parent / "mlserver")
    os.execv(program, [program, "start", "."])
