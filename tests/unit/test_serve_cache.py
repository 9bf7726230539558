"""The cache in process, and in a real Redis that may die."""

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from overtone.bundle import Bundle
from overtone.engine import Engine, OnnxEngine, Probabilities
from serve.cache import Cache, MemoryCache, RedisCache, key_of
from serve.classifier import Classifier

SCORES = [0.1, 0.2, 0.7]


class CountingEngine:
    """A bundle's engine that counts its texts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.labels = engine.labels
        self.texts = 0

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.texts += len(token_ids)
        return self._engine.classify(token_ids)

    def close(self) -> None:
        self._engine.close()


class RedisServer:
    """A redis-server of this test's own, on a unix socket."""

    def __init__(self, program: str, folder: Path) -> None:
        self._command = [
            program,
            "--port",
            "0",
            "--unixsocket",
            str(folder / "r.sock"),
            "--save",
            "",
            "--dir",
            str(folder),
        ]
        self.url = f"unix://{folder / 'r.sock'}"
        self._socket = folder / "r.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while not self._answers():
            assert time.monotonic() < end
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._socket))
            except OSError:
                return False
            return True


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    server = RedisServer(program, tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def now() -> list[float]:
    return [0.0]


@pytest.fixture
async def shared(redis: RedisServer, now: list[float]) -> AsyncIterator[RedisCache]:
    cache = RedisCache(redis.url, ttl_s=60, clock=lambda: now[0])
    yield cache
    await cache.close()


async def classified(bundle: Bundle, cache: Cache) -> tuple[Classifier, CountingEngine]:
    made: list[CountingEngine] = []

    def engine_for(bundle: Bundle, threads: int) -> CountingEngine:
        made.append(CountingEngine(OnnxEngine(bundle, threads)))
        return made[-1]

    classifier = Classifier(engine_for=engine_for, cache=cache)
    await classifier.load(bundle.path)
    made[0].texts = 0
    return classifier, made[0]


def test_a_key_tells_texts_bundles_and_policies_apart_and_holds_no_text() -> None:
    key = key_of("I love  this", "v1", "truncate")

    assert key == key_of("I love this", "v1", "truncate")
    assert len({key, key_of("I hate this", "v1", "truncate"), key_of("I love this", "v2", "truncate")}) == 3
    assert key != key_of("I love this", "v1", "window")
    assert len(key) == 16
    assert key_of("\ud800", "v1", "truncate")


async def test_the_oldest_texts_are_forgotten_first() -> None:
    cache = MemoryCache(2)
    await cache.keep([(b"a", SCORES), (b"b", SCORES)])
    await cache.find([b"a"])
    await cache.keep([(b"c", SCORES)])

    assert await cache.find([b"a", b"b", b"c"]) == [SCORES, None, SCORES]


async def test_a_text_is_classified_once(tiny_bundle: Bundle) -> None:
    classifier, engine = await classified(tiny_bundle, MemoryCache(100))

    first = await classifier.classify(["love", "hate"])
    second = await classifier.classify(["hate", "fine", "love"])
    await classifier.close()

    assert engine.texts == 3
    assert [second.rows[2], second.rows[0]] == first.rows


async def test_replicas_share_what_redis_holds(tiny_bundle: Bundle, redis: RedisServer) -> None:
    one, first = await classified(tiny_bundle, RedisCache(redis.url, ttl_s=60))
    two, second = await classified(tiny_bundle, RedisCache(redis.url, ttl_s=60))

    answers = [await classifier.classify(["love", "hate"]) for classifier in (one, two)]
    await asyncio.gather(one.close(), two.close())

    assert (first.texts, second.texts) == (2, 0)
    assert answers[0].rows == answers[1].rows


async def test_a_redis_that_dies_costs_no_answer_and_is_used_again(
    shared: RedisCache, redis: RedisServer, now: list[float]
) -> None:
    await shared.keep([(b"a", SCORES)])
    assert await shared.find([b"a", b"b"]) == [SCORES, None]

    redis.kill()
    assert await shared.find([b"a"]) == [None]
    await shared.keep([(b"a", SCORES)])
    redis.start()
    assert await shared.find([b"a"]) == [None]  # it rests

    now[0] = 10.0
    await shared.keep([(b"a", SCORES)])
    assert await shared.find([b"a"]) == [SCORES]
