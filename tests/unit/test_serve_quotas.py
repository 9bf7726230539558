"""Limits of accounts: what is granted, what is told, and what Redis adds."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Scope

from overtone.errors import QuotaExceededError, TooLargeError
from serve.auth import Gate, Identity, KeyRing
from serve.quotas import Allowance, Quotas, Window


class Redis:
    """A real server that can be killed and started again."""

    def __init__(self) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.01)
        raise TimeoutError("redis-server did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def redis() -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    server = Redis()
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def quotas() -> AsyncIterator[Quotas]:
    quotas = Quotas()
    yield quotas
    await quotas.close()


async def granted(quotas: Quotas, account: str, allowance: Allowance, *, texts: int = 1, tries: int = 50) -> int:
    """How many requests of `tries` pass."""
    passed = 0
    for _ in range(tries):
        with contextlib.suppress(QuotaExceededError):
            await quotas.spend(account, allowance, texts)
            passed += 1
    return passed


async def test_requests_and_texts_are_counted_for_each_account(quotas: Quotas) -> None:
    # A day, so that no window ends while the test runs.
    assert await granted(quotas, "a", Allowance(texts_per_day=10), texts=3) == 3
    assert await granted(quotas, "a", Allowance(texts_per_day=10), texts=1) == 1
    assert await granted(quotas, "b", Allowance(texts_per_day=10), texts=10) == 1


async def test_a_refused_request_uses_up_nothing(quotas: Quotas) -> None:
    allowance = Allowance(texts_per_day=10)
    await quotas.spend("a", allowance, 6)
    with pytest.raises(QuotaExceededError, match="texts-day a day"):
        await quotas.spend("a", allowance, 5)
    await quotas.spend("a", allowance, 4)


async def test_a_request_over_the_whole_limit_is_told_to_be_smaller(quotas: Quotas) -> None:
    with pytest.raises(TooLargeError, match="may send 10 a day"):
        await quotas.spend("a", Allowance(texts_per_day=10), 11)


async def test_replicas_without_redis_divide_the_limits(quotas: Quotas) -> None:
    quotas.share_among(4)
    assert await granted(quotas, "a", Allowance(texts_per_day=10)) == 3
    # A batch that fits the limit passes though it is over the share, and uses the share up.
    await quotas.spend("b", Allowance(texts_per_day=10), 10)
    assert await granted(quotas, "b", Allowance(texts_per_day=10)) == 0


async def test_the_headers_tell_limits_and_what_is_left(quotas: Quotas) -> None:
    allowance = Allowance(requests_per_minute=1000, texts_per_day=50)
    assert dict(quotas.headers("a", allowance)) == {
        b"ratelimit-policy": b'"requests";q=1000;w=60, "texts-day";q=50;w=86400'
    }
    await quotas.spend("a", allowance, 20)
    headers = dict(quotas.headers("a", allowance))
    assert b'"texts-day";r=30;t=' in headers[b"ratelimit"]
    assert b'"requests";r=999;t=' in headers[b"ratelimit"]


def windows() -> st.SearchStrategy[Window]:
    counts = st.integers(0, 1000)
    left = st.floats(0, 60, allow_nan=False)
    return st.builds(
        Window, st.integers(1, 1000), st.just(60.0), past=counts, past_left_s=left, present=counts, present_left_s=left
    )


@given(windows(), st.data())
def test_after_the_wait_the_cost_fits_and_not_long_before(window: Window, data: st.DataObject) -> None:
    cost = data.draw(st.integers(1, window.limit))
    wait_s = window.wait_s(cost)
    assert 0 <= wait_s <= window.present_left_s + window.length_s or window.past_left_s >= wait_s
    if wait_s == 0:
        assert window.past * window.past_left_s / window.length_s + window.present + cost <= window.limit + 1e-6


async def test_replicas_share_their_limits_through_redis(redis: Redis) -> None:
    first, second = Quotas(redis.url), Quotas(redis.url)
    first.share_among(2)
    second.share_among(2)
    allowance = Allowance(texts_per_day=20)
    assert await granted(first, "a", allowance, texts=2, tries=4) + await granted(second, "a", allowance, texts=2) == 10
    await first.close()
    await second.close()


async def test_without_redis_each_replica_counts_by_itself_until_it_is_back(redis: Redis) -> None:
    clock, allowance = Clock(), Allowance(texts_per_day=10)
    quotas = Quotas(redis.url, retry_s=5, clock=clock)
    assert await granted(quotas, "a", allowance, texts=5) == 2
    redis.kill()
    assert await granted(quotas, "a", allowance, texts=5) == 2
    redis.start()
    assert await granted(quotas, "a", allowance, texts=5) == 0
    clock.now = 6
    assert await granted(quotas, "a", allowance, texts=5) == 2
    await quotas.close()


async def test_only_callers_with_limits_are_counted_and_told() -> None:
    class Store:
        async def active(self) -> dict[bytes, Identity]:
            return {}

        async def find(self, digest: bytes) -> Identity | None:
            return None

    gate = Gate(KeyRing(Store()))
    free, limited = Identity("k1", frozenset()), Identity("k2", frozenset(), None, "acc", Allowance(texts_per_day=2))
    for _ in range(5):
        await gate.spend(free, 1_000_000)
    await gate.spend(limited, 2)
    with pytest.raises(QuotaExceededError):
        await gate.spend(limited, 1)
    scope: Scope = {"overtone.limited": limited}
    assert gate.limit_headers({}) == []
    assert dict(gate.limit_headers(scope))[b"ratelimit"].startswith(b'"texts-day";r=0;')
