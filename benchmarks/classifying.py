"""Posts that are stored and classified a second, against what the server gives to a client that does nothing else."""

import asyncio
import time
from collections.abc import Sequence

from benchmarks.load import Target
from benchmarks.results import Result, ratio
from ingest.classify import Classifier
from ingest.options import ClassifyOptions
from ingest.predict import PredictClient
from ingest.store import PostStore
from overtone.db.database import Database
from overtone.errors import UnavailableError
from overtone.schema import Post, Prediction

_OPTIONS = ClassifyOptions(scan_every_s=3_600.0, scan_back_s=1.0)


async def classify_ratio(
    db: Database, target: Target, rounds: Sequence[tuple[Sequence[Post], Sequence[Post]]]
) -> Result:
    """In turn: store and classify the first posts of a round, ask the server alone for the second ones.

    Both send requests of the same size, as many at a time.

    Raises:
        UnavailableError: the server postponed or refused a text.
    """
    ours, alone = list[float](), list[float]()
    client = PredictClient(target.url, target.key_header, lambda: target.key)
    async with client:
        await _alone(client, rounds[0][1])
        for stored, asked in rounds:
            ours.append(await _stored(db, client, stored))
            alone.append(await _alone(client, asked))
    return ratio(ours, alone, posts_per_s=ours, server_texts_per_s=alone, texts_a_request=_OPTIONS.batch_texts)


async def _stored(db: Database, client: PredictClient, posts: Sequence[Post]) -> float:
    classifier = Classifier(db, client, _OPTIONS)
    store = PostStore(db, classifier, epoch=None)
    work = asyncio.create_task(classifier.run())
    began = time.perf_counter()
    for start in range(0, len(posts), 500):
        await store.store(posts[start : start + 500], stream="benchmark_classified")
    while classifier.status.predictions_stored < len(posts):  # noqa: ASYNC110  it spans a queue and a table
        await asyncio.sleep(0.005)
    rate = len(posts) / (time.perf_counter() - began)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return rate


async def _alone(client: PredictClient, posts: Sequence[Post]) -> float:
    size, texts = _OPTIONS.batch_texts, [post.text for post in posts]
    waiting = [texts[start : start + size] for start in range(0, len(texts), size)]

    async def work() -> None:
        while waiting:
            if not all(isinstance(one, Prediction) for one in await client.predict(waiting.pop())):
                raise UnavailableError("The server did not classify every text.")

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(_OPTIONS.workers)))
    return len(texts) / (time.perf_counter() - began)
