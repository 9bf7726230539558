"""The ingestion as a detached actor on a real Ray: it starts by itself, and again after it is killed."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from aiohttp import web

from ingest.actor import NAMESPACE, find_actors, start_actors
from ingest.options import IngestOptions, LeaderOptions, RepairOptions
from ingest.simulator import SimulatorOptions, start_simulator
from overtone.db import Database
from overtone.db.predictions import counts
from overtone.metrics import exposition
from overtone.ports import free_ports
from overtone.settings import load_settings

LIMIT = 1_500
QUICK = IngestOptions(
    repair=RepairOptions(overlap_s=1.0, settle_s=0.3, first_start_back_s=3_600.0), leader=LeaderOptions(standbys=1)
)


async def predict(request: web.Request) -> web.Response:
    texts = (await request.json())["texts"]
    one = {"label": "neutral", "confidence": 1.0, "scores": {"neutral": 1.0}, "model_version": "fake-1"}
    return web.json_response({"model_version": "fake-1", "predictions": [one] * len(texts)})


@pytest.fixture
async def surroundings(fresh_postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """An API that classifies, a simulator, and an environment that points the actor at them."""
    app = web.Application()
    app.router.add_post("/predict/batch", predict)
    api = web.AppRunner(app, shutdown_timeout=0.1)
    await api.setup()
    await web.TCPSite(api, "127.0.0.1", 0).start()
    simulator = await start_simulator(SimulatorOptions(rate=150.0, limit=LIMIT), "127.0.0.1", 0)
    for name, value in {
        "TWITTER_BEARER_TOKEN": "t",
        "X_API_BASE_URL": f"http://127.0.0.1:{simulator.addresses[0][1]}",
        "DATABASE_URL": fresh_postgres_url,
        "API_PORT": str(api.addresses[0][1]),
        "OVERTONE_API_KEY": "ovt_test",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        monkeypatch.setenv(name, value)
    yield fresh_postgres_url
    await simulator.cleanup()
    await api.cleanup()


@pytest.fixture
def ray_here(surroundings: str) -> Iterator[Any]:
    """A Ray of this test alone, started in the environment that `surroundings` prepared."""
    folder = tempfile.mkdtemp(prefix="ovt-ray-", dir="/tmp")
    port = free_ports(1)[0]
    command = f"start --head --block --disable-usage-stats --include-dashboard=false --num-cpus=1 --port={port}"
    head = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            *command.split(),
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={folder}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield connected_ray(f"127.0.0.1:{port}")
        ray.shutdown()
    finally:
        stop_whole(head)
        shutil.rmtree(folder, ignore_errors=True)


def connected_ray(address: str) -> Any:
    """Ray's module, once the head that is starting at `address` lets it in."""
    end = time.monotonic() + 90
    while True:
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
            return ray
        except (ConnectionError, RuntimeError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def stop_whole(head: subprocess.Popen[bytes]) -> None:
    """Stop the head and every process it started."""
    family = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(10)
    head.kill()
    head.wait()


async def eventually(holds: Callable[[], Any], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.2)


async def test_a_killed_leader_is_replaced_and_nothing_is_lost(
    surroundings: str, ray_here: Any, tmp_path: Path
) -> None:
    """The first of two actors is killed: the standby leads at once, and the first comes back as the standby."""
    db = await Database.open(surroundings, max_size=2)
    handles = await asyncio.to_thread(start_actors, load_settings(), QUICK, metrics_folder=tmp_path)

    async def statuses() -> list[dict[str, Any]]:
        asked = [handle.status.remote() for handle in handles]
        return [dict(one) for one in await asyncio.to_thread(ray_here.get, asked, timeout=60)]

    async def has_posts(count: int) -> bool:
        return (await counts(db)).posts >= count

    await eventually(lambda: has_posts(200))
    before = {one["role"]: one for one in await statuses()}
    assert before["leader"]["connected"]
    assert not before["standby"]["connected"]
    os.kill(before["leader"]["pid"], signal.SIGKILL)

    async def is_whole() -> bool:
        stored = await counts(db)
        return (stored.posts, stored.predictions) == (LIMIT, LIMIT)

    after: dict[str, dict[str, Any]] = {}

    async def are_both_back() -> bool:
        nonlocal after
        after = {one["role"]: one for one in await statuses()}
        return set(after) == {"leader", "standby"} and {one["state"] for one in after.values()} == {"running"}

    await eventually(is_whole)
    await eventually(are_both_back)
    assert b"overtone_ingest_posts_stored_total" in exposition(tmp_path)
    assert after["leader"]["pid"] == before["standby"]["pid"]
    assert after["standby"]["pid"] not in {one["pid"] for one in before.values()}
    again = await asyncio.to_thread(start_actors, load_settings(), QUICK)
    assert again == await asyncio.to_thread(find_actors) == handles
    assert all(await asyncio.to_thread(ray_here.get, [handle.stop.remote() for handle in handles]))
    assert {one["state"] for one in await statuses()} == {"stopped"}
    await db.close()
