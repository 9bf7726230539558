"""A job on the whole stack while its consumers and Redis are killed, in the short form of `benchmarks.jobs`."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.jobs import Trial, World, live_through

pytestmark = pytest.mark.timeout(900)

SHORT = Trial(texts=20_000, consumer_kills=1, redis_kills=1, patience_s=600.0)


@pytest.fixture
def world() -> Iterator[World]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with tempfile.TemporaryDirectory(prefix="overtone-jobs-", dir="/tmp") as folder, World(Path(folder)) as world:
        yield world


def test_a_job_outlives_its_consumers_and_redis(world: World) -> None:
    account = live_through(world, SHORT)
    assert (account.consumers_killed, account.redis_killed) == (1, 1)
    assert account.is_whole, account
    assert account.is_flat, account
    assert account.workers_answering == 1
