"""FastAPI around a transformers pipeline on ONNX Runtime: `python -m benchmarks.peers.fastapi.server PORT WORKERS`."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import uvicorn
from fastapi import FastAPI
from optimum.onnxruntime import ORTModelForSequenceClassification
from pydantic import BaseModel
from transformers import AutoTokenizer, pipeline

from benchmarks.peers.hub import write_hub_folder
from overtone.bundle import load_bundle
from overtone.settings import load_settings
from overtone.text import normalise

FOLDER = Path.cwd() / "model"

app = FastAPI()


class Texts(BaseModel):
    """The body of a request."""

    texts: list[str]


@cache
def _classifier() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = ORTModelForSequenceClassification.from_pretrained(FOLDER, session_options=options)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, batch_size=32)


@app.post("/predict")
def predict(body: Texts) -> dict[str, Any]:
    """The scores of each text."""
    return {"predictions": _classifier()([normalise(text) for text in body.texts], truncation=True)}


@app.get("/ready")
async def ready() -> None:
    """Load the model."""
    _classifier()


if __name__ == "__main__":
    write_hub_folder(load_bundle(load_settings().bundle), FOLDER)
    uvicorn.run(
        "benchmarks.peers.fastapi.server:app",
        host="127.0.0.1",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        log_level="warning",
    )
