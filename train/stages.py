"""The three stages of a re-scoring, each an actor pool of Ray Data: read posts, classify them, write predictions.

Between them go columns: numpy arrays by name, all of one length. A stage that reaches for the database keeps one
connection and waits while the database is away.
"""

import asyncio
import math
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from overtone.bundle import TextEncoder, load_bundle
from overtone.db.database import Database
from overtone.db.embedded import url_of
from overtone.db.predictions import write_predictions
from overtone.db.rescoring import posts_to_rescore
from overtone.engine import Engine, Probabilities, classify_sorted, open_engine
from overtone.errors import DatabaseUnavailableError, EngineError
from overtone.logging import configure, get_logger
from overtone.schema import Prediction
from overtone.settings import Settings, load_settings

APPLICATION = "overtone-rescore"
"""What the connections call themselves to PostgreSQL."""

Columns = Mapping[str, NDArray[Any]]

_PATIENCE_S = 300.0
"""How long the database may be away."""

T = TypeVar("T")


class PostReader:
    """Spans of post ids in, the posts out that still lack a prediction: `post_id` int64, `text` str."""

    def __init__(self, model_version: str, per_second: float | None) -> None:
        self._version = model_version
        self._pace = Pace(per_second)
        self._database = _OneConnection()

    def __call__(self, spans: Columns) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns `first` and `last`, both included; at most one batch a span, none for one that is done."""
        for first, last in zip(spans["first"].tolist(), spans["last"].tolist(), strict=True):
            work = partial(posts_to_rescore, model_version=self._version, first=first, last=last)
            posts = self._database.do(work)
            self._pace.wait_for(len(posts))
            if posts:
                ids, texts = zip(*posts, strict=True)
                yield {"post_id": np.array(ids, dtype=np.int64), "text": np.array(texts, dtype=object)}

    def close(self) -> None:
        """Leave the database. The end of its process, which is how Ray ends an actor, does that too."""
        self._database.close()


class Scorer:
    """Posts in, their scores out: `post_id` int64, `scores` float32 [posts, labels], NaN where the model failed."""

    def __init__(self, files: Any) -> None:
        """`files` is a Ray reference to the contents of the bundle's files by name: no machine needs its folder."""
        settings = load_settings()
        configure("rescore", settings.log_level, settings.log_format)
        self._encoder, self._engine = _open_bundle(ray.get(files), settings)

    def __call__(self, posts: Columns) -> dict[str, NDArray[Any]]:
        """Columns `post_id` and `text`."""
        ids = self._encoder.encode(posts["text"].tolist())
        return {"post_id": posts["post_id"], "scores": scores_of(self._engine, ids)}


class PredictionWriter:
    """Scores in, counts out: `read`, `written` and `failed` posts, a row a transaction.

    What was erased since it was read is not written, nor what has a prediction by the same version.
    """

    def __init__(self, model_version: str, labels: tuple[str, ...]) -> None:
        self._version, self._labels = model_version, labels
        self._database = _OneConnection()

    def __call__(self, scored: Columns) -> dict[str, NDArray[Any]]:
        """Columns `post_id` and `scores`."""
        rows = [
            (post_id, self._prediction(scores))
            for post_id, scores in zip(scored["post_id"].tolist(), scored["scores"].tolist(), strict=True)
            if not math.isnan(scores[0])
        ]
        read = len(scored["post_id"])
        written = self._database.do(lambda db: write_predictions(db, rows))
        counts = {"read": read, "written": written, "failed": read - len(rows)}
        return {name: np.array([count]) for name, count in counts.items()}

    def close(self) -> None:
        """See `PostReader.close`."""
        self._database.close()

    def _prediction(self, scores: list[float]) -> Prediction:
        best = scores.index(max(scores))
        by_label = dict(zip(self._labels, scores, strict=True))
        return Prediction(self._labels[best], scores[best], by_label, self._version)


class Pace:
    """Lets so many posts a second through, and what is waiting wait; None: all of them at once."""

    def __init__(
        self,
        per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._per_second, self._clock, self._sleep = per_second, clock, sleep
        self._free_at = clock()

    def wait_for(self, posts: int) -> None:
        """Return when those before have had their time; `posts` more take theirs from now on."""
        if not self._per_second:
            return
        now = self._clock()
        if self._free_at > now:
            self._sleep(self._free_at - now)
        self._free_at = max(self._free_at, now) + posts / self._per_second


def scores_of(engine: Engine, token_ids: list[list[int]]) -> Probabilities:
    """Calibrated probabilities, float32 [n, labels], in the order given; NaN in the rows of texts that the model
    fails on, each of which is tried alone before it is given up."""
    try:
        return classify_sorted(engine, token_ids)
    except EngineError:
        rows = [_alone(engine, ids) for ids in token_ids]
        failed = sum(bool(np.isnan(row[0])) for row in rows)
        get_logger().warning("rescore.texts_failed", posts=failed)
        return np.stack(rows)


def _alone(engine: Engine, ids: list[int]) -> Probabilities:
    try:
        row: Probabilities = engine.classify([ids])[0]
    except EngineError:
        row = np.full(engine.labels, np.nan, dtype=np.float32)
    return row


def _open_bundle(files: Mapping[str, bytes], settings: Settings) -> tuple[TextEncoder, Engine]:
    with tempfile.TemporaryDirectory(prefix="overtone-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        bundle = load_bundle(folder)
        return TextEncoder(bundle), open_engine(bundle, wanted=settings.engine, built=settings.tensorrt_folder)


class _OneConnection:
    """A database, reached by one connection from a process without an event loop."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._db: Database | None = None

    def do(self, work: Callable[[Database], Awaitable[T]]) -> T:
        """What `work` returns, which may be done twice where the database goes away meanwhile.

        Raises:
            DatabaseUnavailableError: it stayed away.
        """
        trying = Retrying(
            retry=retry_if_exception_type(DatabaseUnavailableError),
            wait=wait_exponential(multiplier=0.2, max=5.0),
            stop=stop_after_delay(_PATIENCE_S),
            reraise=True,
        )
        return trying(lambda: self._runner.run(self._once(work)))

    def close(self) -> None:
        """Close the connection; nothing can be done by it afterwards."""
        if self._db is not None:
            self._runner.run(self._db.close())
        self._runner.close()

    async def _once(self, work: Callable[[Database], Awaitable[T]]) -> T:
        if self._db is None:
            self._db = await Database.open(url_of(load_settings()), max_size=1, application_name=APPLICATION)
        return await work(self._db)
