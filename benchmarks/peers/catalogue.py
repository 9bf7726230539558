"""The peers: how each is asked, how it answers, and how it was tuned and why."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """One other server. Its code is in `NAME/server.py`, what it needs in `NAME/requirements.txt`."""

    name: str
    title: str
    path: str
    """Of the route that takes requests of any number of texts."""
    ready_path: str
    body: Callable[[list[str]], Body]
    """The request for some texts."""
    labels: Callable[[Any], list[str]]
    """The label of each text, from the answer."""
    tuning: tuple[str, ...]
    """Each choice and its reason, in a line."""
    normalises: bool = True
    """Whether the server prepares texts as the bundle learned them; if not, it is sent prepared ones, for free."""

    @property
    def folder(self) -> Path:
        """Its code and requirements."""
        return Path(__file__).parent / self.name

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return f"benchmarks.peers.{self.name}.server"


def _texts(texts: list[str]) -> Body:
    return {"texts": texts}


def _predictions(answer: Any) -> list[str]:
    return [row["label"] for row in answer["predictions"]]


def _best(rows: Any) -> list[str]:
    """The labels of answers that list every label with its score."""
    return [str(max(row, key=lambda entry: entry["score"])["label"]) for row in rows]


def _tensor(texts: list[str]) -> Body:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}


def _first_column(answer: Any) -> list[str]:
    return list(answer["outputs"][0]["data"])


_WORKERS = "workers: one a core with a one-thread session each, as many as Overtone has replicas"
_WINDOW = "batch: up to 32 requests, 10 ms wait, as peers' examples do; larger batches gain nothing on these cores"

PEERS = (
    Peer(
        "litserve",
        "LitServe",
        "/predict",
        "/health",
        _texts,
        _predictions,
        (_WORKERS, _WINDOW, "API servers: its default, one process a worker"),
    ),
    Peer(
        "bentoml",
        "BentoML",
        "/predict",
        "/readyz",
        _texts,
        lambda answer: [row["label"] for row in answer],
        (
            _WORKERS,
            "batch: adaptive, up to 256 texts so that a request of 256 is taken whole",
            "latency bound: its default of 60 s, so that its dispatcher refuses nothing while it learns",
        ),
    ),
    Peer(
        "infinity",
        "infinity",
        "/classify",
        "/health",
        lambda texts: {"model": "sentiment", "input": texts},
        lambda answer: _best(answer["data"]),
        (
            "workers: one process, as it runs one engine a model; its session takes every core",
            "engine: optimum, its ONNX Runtime way; its own graph optimiser is off, as the file is optimised already",
            "batch: 32, its default; it sorts by length by itself",
        ),
        normalises=False,
    ),
    Peer(
        "mlserver",
        "MLServer",
        "/v2/models/sentiment/infer",
        "/v2/models/sentiment/ready",
        _tensor,
        _first_column,
        ("parallel_workers: one a core with a one-thread session each", _WINDOW),
    ),
    Peer(
        "mlflow",
        "mlflow models serve",
        "/invocations",
        "/ping",
        lambda texts: {"dataframe_split": {"columns": ["text"], "data": [[text] for text in texts]}},
        _predictions,
        (_WORKERS, "batch: none; it joins no requests"),
    ),
    Peer(
        "rayserve",
        "Ray Serve, default proxy",
        "/predict",
        "/-/healthz",
        _texts,
        _predictions,
        (
            "replicas: one a core with a one-thread session each",
            _WINDOW,
            "max_ongoing_requests: 512, as its guide to batching asks for more than the default of 5",
        ),
    ),
    Peer(
        "fastapi",
        "FastAPI and a transformers pipeline",
        "/predict",
        "/ready",
        _texts,
        lambda answer: _best(answer["predictions"]),
        (
            _WORKERS,
            "batch: 32 within a request; it joins no requests",
            "model: ORTModel, several times faster than torch",
        ),
    ),
)

NAMES = tuple(peer.name for peer in PEERS)


def peer_named(name: str) -> Peer:
    """The peer of this name; StopIteration if there is none."""
    return next(peer for peer in PEERS if peer.name == name)
