"""From the simulator's stream to predictions in PostgreSQL: every post stored and predicted exactly once.

The API that classifies is a stand-in here: a real HTTP server with a fake engine and switches to make it fail.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ingest.options import ClassifyOptions, IngestOptions, LeaderOptions, RepairOptions, SpendOptions, StreamOptions
from ingest.pipeline import Ingestion
from ingest.posts import Generator, PostSource, open_posts
from ingest.simulator import Simulator, SimulatorOptions
from overtone.db import Database
from overtone.db.embedded import EmbeddedPostgres
from overtone.db.gaps import list_gaps
from overtone.db.migrate import upgrade
from overtone.errors import OvertoneError, StreamFatalError
from overtone.ports import free_ports
from overtone.settings import Settings, environment_for, load_settings

ROOT = Path(__file__).parents[2]
KEY = "ovt_test"
QUICK = IngestOptions(
    stream=StreamOptions(connects_per_window=1_000, stable_s=0.5),
    classify=ClassifyOptions(scan_every_s=1.0, queue_posts=200),
    repair=RepairOptions(overlap_s=1.0, settle_s=0.3, first_start_back_s=3_600.0),
    drain_s=10.0,
)


@dataclass
class StandInApi:
    """`POST /predict/batch` as the product answers it; the label follows from the length of the text."""

    status: int = 200
    asked: Counter[str] = field(default_factory=Counter)

    async def answer(self, request: web.Request) -> web.Response:
        texts = json.loads(await request.read())["texts"]
        if request.headers.get("X-API-Key") != KEY:
            return web.json_response({"code": "unauthorized", "detail": "no"}, status=401)
        if self.status != 200:
            return web.json_response({"code": "unavailable", "detail": "later"}, status=self.status)
        if any(text.startswith("WHOLE") for text in texts):
            return web.json_response({"code": "too_large", "detail": "no"}, status=422)
        self.asked.update(texts)
        return web.json_response({"model_version": "fake-1", "predictions": [self._one(text) for text in texts]})

    def _one(self, text: str) -> dict[str, Any]:
        if text.startswith("REFUSE"):
            return {"error": {"code": "invalid_input", "detail": "no"}}
        scores = {"negative": 0.1, "neutral": 0.2, "positive": 0.7}
        label = ("negative", "neutral", "positive")[len(text) % 3]
        return {"label": label, "confidence": 0.7, "scores": scores, "model_version": "fake-1"}


class World:
    """Simulator, API and database around the ingestion; and the ingestion itself, as often as it is started."""

    def __init__(self, url: str, home: Path) -> None:
        self.url = url
        self.home = home
        self.api = StandInApi()
        self.simulator: Simulator | None = None
        self.published: set[int] = set()
        self.limit = 0
        self._stack = contextlib.AsyncExitStack()
        self._simulator_runner: web.AppRunner | None = None
        self._running: dict[asyncio.Task[None], asyncio.Event] = {}

    async def __aenter__(self) -> "World":
        app = web.Application()
        app.router.add_post("/predict/batch", self.api.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.api_port = runner.addresses[0][1]
        self.simulator_port = free_ports(1)[0]
        self.http = await self._stack.enter_async_context(aiohttp.ClientSession())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._running):
            await self.crash(task)
        await self.stop_simulator()
        await self._stack.aclose()

    @property
    def settings(self) -> Settings:
        return load_settings(
            overtone_home=self.home,
            twitter_bearer_token="t",
            x_api_base_url=f"http://127.0.0.1:{self.simulator_port}",
            database_url=self.url,
            api_port=self.api_port,
            overtone_api_key=KEY,
        )

    async def start_simulator(self, source: PostSource | None = None, **options: Any) -> None:
        self.limit = options.get("limit", 0)
        self.simulator = Simulator(
            SimulatorOptions(**{"rate": 400.0, "connects_per_window": 1_000, **options}), source or Generator()
        )
        self._simulator_runner = web.AppRunner(
            self.simulator.application(), handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._simulator_runner.setup()
        await web.TCPSite(self._simulator_runner, "127.0.0.1", self.simulator_port, reuse_address=True).start()

    async def stop_simulator(self) -> None:
        if self._simulator_runner is not None and self.simulator is not None:
            await self._simulator_runner.cleanup()
            self.published.update(self.simulator.timeline.ids())
            self._simulator_runner = None

    async def fault(self, kind: str, **more: Any) -> None:
        address = f"http://127.0.0.1:{self.simulator_port}/simulator/faults"
        async with self.http.post(address, json={"kind": kind, **more}) as response:
            assert response.status == 200

    def start(self, options: IngestOptions = QUICK) -> tuple[Ingestion, asyncio.Task[None]]:
        ingestion, stop = Ingestion(self.settings, options), asyncio.Event()
        task = asyncio.create_task(ingestion.run(stop))
        self._running[task] = stop
        return ingestion, task

    async def stop(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task).set()
        await asyncio.wait_for(task, 30)

    async def crash(self, task: asyncio.Task[None]) -> None:
        """End the ingestion where it stands, without any goodbye."""
        self._running.pop(task, None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def rows(self, statement: str) -> list[Any]:
        db = await Database.open(self.url, max_size=1)
        try:
            async with db.acquire() as connection:
                return [row[0] for row in await connection.fetch(statement)]
        finally:
            await db.close()

    async def posts(self) -> int:
        return int((await self.rows("SELECT count(*) FROM overtone.posts"))[0])

    async def until_posts(self, count: int) -> None:
        await eventually(lambda: self._has_posts(count))

    async def _has_posts(self, count: int) -> bool:
        return await self.posts() >= count

    async def until_whole(self, *, refused: int = 0, since: int = 0) -> None:
        """Return once what the simulator published in all its lives, from the post with the id `since` on, is stored
        and predicted, each exactly once.
        """

        async def is_whole() -> bool:
            assert self.simulator is not None
            if self.simulator.timeline.end < self.limit:
                return False
            wanted = {post for post in self.published | set(self.simulator.timeline.ids()) if post >= since}
            stored = await self.rows("SELECT post_id FROM overtone.posts")
            predicted = await self.rows("SELECT post_id FROM overtone.predictions")
            assert len(stored) == len(set(stored))
            assert len(predicted) == len(set(predicted))
            return set(stored) == wanted and len(predicted) == len(wanted) - refused

        await eventually(is_whole)


async def eventually(holds: Callable[[], Any], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(OvertoneError, OSError):
                if await holds():
                    return
            await asyncio.sleep(0.1)


@pytest.fixture
async def world(fresh_postgres_url: str, tmp_path: Path) -> AsyncIterator[World]:
    async with World(fresh_postgres_url, tmp_path / "home") as made:
        yield made


async def test_nothing_is_lost_or_doubled_over_lost_connections(world: World) -> None:
    await world.start_simulator(limit=1_200)
    ingestion, task = world.start()
    for number, kind in enumerate(("disconnect", "reset", "close", "reset"), start=1):
        await world.until_posts(200 * number)
        await world.fault("duplicate", amount=50)
        await world.fault("garbage", amount=1)
        await world.fault(kind)
    await world.until_whole()
    await eventually(lambda: _no_gap_left(world))
    assert world.simulator is not None
    assert world.simulator.connects <= 8
    assert await world.rows("SELECT attempts FROM overtone.dead_letters") != []
    status = ingestion.status()
    assert (status["connected"], status["predictions_stored"], status["pending_posts"]) == (True, 1_200, 0)
    await world.stop(task)
    assert ingestion.status()["state"] == "stopped"


async def _no_gap_left(world: World) -> bool:
    db = await Database.open(world.url, max_size=1)
    try:
        gaps = await list_gaps(db, "simulator")
    finally:
        await db.close()
    return bool(gaps) and all(gap.state == "repaired" for gap in gaps)


async def test_the_simulator_may_be_started_again(world: World) -> None:
    await world.start_simulator(limit=200)
    world.start()
    await world.until_whole()
    await world.stop_simulator()
    await world.start_simulator(Generator(seed=2), limit=300)
    await world.until_whole()
    assert len(world.published) == 200


async def test_a_killed_database_delays_and_loses_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path(tmp_path_factory.mktemp("pg"))
    server = EmbeddedPostgres(folder / "data", folder / "s")
    url = await asyncio.to_thread(server.start)
    try:
        await upgrade(url)
        async with World(url, folder / "home") as world:
            await world.start_simulator(limit=1_000)
            ingestion, _ = world.start(QUICK.model_copy(update={"repair": RepairOptions(enabled=False)}))
            await world.until_posts(200)
            # Without repair nobody fetches what was published before the stream was open.
            (first,) = await world.rows("SELECT min(post_id) FROM overtone.posts")
            pid = server.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda: _is_delayed(ingestion))
            await eventually(lambda: _has_spooled(ingestion, 50_000))
            await asyncio.to_thread(server.start)
            await world.until_whole(since=first)
            assert ingestion.status()["spool_bytes"] == 0
    finally:
        await asyncio.to_thread(server.stop)


async def _has_spooled(ingestion: Ingestion, size_bytes: int) -> bool:
    return bool(ingestion.status()["spool_bytes"] >= size_bytes)


async def _is_delayed(ingestion: Ingestion) -> bool:
    return ingestion.status()["last_error"] is not None


async def test_a_process_killed_twice_loses_nothing(world: World, tmp_path: Path) -> None:
    await world.start_simulator(rate=200.0, limit=1_600)
    environment = environment_for(
        world.settings,
        TWITTER_BEARER_TOKEN="t",
        X_API_BASE_URL=world.settings.x_api_base_url,
        DATABASE_URL=world.url,
        OVERTONE_API_KEY=KEY,
        LOG_LEVEL="WARNING",
    )

    def spawn() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "ingest"], cwd=ROOT, env=environment)

    process = spawn()
    try:
        for count in (300, 800):
            await world.until_posts(count)
            process.kill()
            process.wait()
            process = spawn()
        await world.until_whole()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()
        process.wait()


async def test_posts_that_are_poison_hold_up_no_other(world: World, tmp_path: Path) -> None:
    texts = ["fine", "nul \x00 inside", "half \ud83d pair", "REFUSE me", "WHOLE request", "x" * 30_000, "also fine 😀"]
    path = tmp_path / "poison.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    await world.start_simulator(open_posts(path, 0), limit=280)
    ingestion, task = world.start()
    await world.until_whole(refused=80)
    await eventually(lambda: _has_refused(ingestion, 80))
    await world.stop(task)
    reasons = await world.rows("SELECT reason FROM overtone.dead_letters")
    assert Counter(reasons) == {"not classified: invalid_input": 80}
    assert world.api.asked["nul \ufffd inside"] >= 40


async def _has_refused(ingestion: Ingestion, count: int) -> bool:
    return bool(ingestion.status()["refused_posts"] == count)


@pytest.mark.parametrize("status", [429, 500, 503, 401])
async def test_posts_are_stored_while_nobody_classifies(world: World, status: int) -> None:
    world.api.status = status
    await world.start_simulator(limit=500)
    ingestion, _ = world.start()
    await world.until_posts(500)
    await eventually(lambda: _is_delayed(ingestion))
    assert await world.rows("SELECT post_id FROM overtone.predictions") == []
    world.api.status = 200
    await world.until_whole()


async def test_a_restart_classifies_what_is_missing(world: World) -> None:
    world.api.status = 503
    await world.start_simulator(limit=500)
    _, task = world.start()
    await world.until_posts(500)
    await world.crash(task)
    world.api.status = 200
    ingestion, _ = world.start()
    await world.until_whole()
    assert set(world.api.asked.values()) <= set(range(1, 500))
    assert ingestion.status()["predictions_stored"] == 500


async def test_a_gap_outlives_the_process_that_found_it(world: World) -> None:
    """Later posts are stored before the gap is repaired; the cursor alone would then hide it."""
    await world.start_simulator(rate=200.0, limit=1_500)
    _, task = world.start()
    await world.until_posts(200)
    await world.crash(task)
    assert world.simulator is not None
    missed_until = world.simulator.timeline.end + 200
    await eventually(lambda: _has_published(world, missed_until))
    await world.fault("search_down", amount=3_600)
    before = await world.posts()
    ingestion, task = world.start()
    await world.until_posts(before + 100)
    assert ingestion.status()["open_gaps"] >= 1
    await world.crash(task)
    await world.fault("search_down", amount=0)
    world.start()
    await world.until_whole()


async def _has_published(world: World, count: int) -> bool:
    assert world.simulator is not None
    return world.simulator.timeline.end >= count


async def test_a_second_process_stands_by_and_takes_over(world: World) -> None:
    await world.start_simulator(limit=1_500)
    first, leading = world.start()
    await world.until_posts(200)
    second, _ = world.start()
    await eventually(lambda: _has_role(second, "standby"))
    await world.until_posts(400)
    assert (first.status()["role"], second.status()["connected"]) == ("leader", False)
    await world.crash(leading)
    await eventually(lambda: _has_role(second, "leader"))
    await world.until_whole()


async def test_a_leader_that_was_paused_steps_down(world: World) -> None:
    """PostgreSQL hears nothing of it and gives the lock to the standby; what it still writes is refused."""
    await world.start_simulator(rate=200.0, limit=2_500)
    leader = LeaderOptions(lease_s=1.0, poll_s=0.1)
    (world.home.parent / "ha.yaml").write_text(
        QUICK.model_copy(update={"leader": leader}).model_dump_json(exclude_unset=True)
    )
    environment = environment_for(
        world.settings,
        TWITTER_BEARER_TOKEN="t",
        X_API_BASE_URL=world.settings.x_api_base_url,
        DATABASE_URL=world.url,
        OVERTONE_API_KEY=KEY,
        LOG_LEVEL="INFO",
    )
    log = world.home.parent / "paused.log"
    command = [sys.executable, "-m", "ingest", "--config", str(world.home.parent / "ha.yaml")]

    def spawn() -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    process = spawn()
    try:
        await world.until_posts(200)
        standby, _ = world.start(QUICK.model_copy(update={"leader": leader}))
        await eventually(lambda: _has_role(standby, "standby"))
        process.send_signal(signal.SIGSTOP)
        await eventually(lambda: _has_role(standby, "leader"))
        before = await world.posts()
        await world.until_posts(before + 200)
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: asyncio.to_thread(_says, log, "ingest.stepped_down", "ingest.standing_by"))
        await world.until_whole()
        assert standby.status()["role"] == "leader"
        assert await world.rows("SELECT epoch FROM overtone.stream_cursor WHERE stream = 'simulator'") == [2]
        await eventually(lambda: _no_gap_left(world))
    finally:
        process.kill()
        process.wait()


def _says(log: Path, *words: str) -> bool:
    return all(word in log.read_text() for word in words)


async def _has_role(ingestion: Ingestion, role: str) -> bool:
    return bool(ingestion.status().get("role") == role)


async def test_a_refused_token_ends_the_ingestion_and_says_so(world: World) -> None:
    await world.start_simulator(token="another")
    ingestion, task = world.start()
    with pytest.raises(StreamFatalError, match="bearer token"):
        await asyncio.wait_for(task, 30)
    assert ingestion.status()["state"] == "stopped"
    assert "bearer token" in ingestion.status()["last_error"]


async def test_a_stop_stores_and_classifies_what_was_received(world: World) -> None:
    await world.start_simulator()
    _, task = world.start()
    await world.until_posts(200)
    await world.stop(task)
    posts = set(await world.rows("SELECT post_id FROM overtone.posts"))
    assert posts == set(await world.rows("SELECT post_id FROM overtone.predictions"))


async def test_reading_stops_before_the_cap(world: World) -> None:
    spend = SpendOptions(monthly_posts=300, stop_at=0.9)
    await world.start_simulator(limit=2_000)
    ingestion, task = world.start(QUICK.model_copy(update={"spend": spend}))
    await eventually(lambda: _is_capped(ingestion))
    await eventually(lambda: _has_published(world, 1_000))
    status = ingestion.status()
    # A page of a search is read whole: it is the most by which reading can go on.
    assert 270 <= status["posts_read"] <= 270 + 100
    assert await world.posts() <= status["posts_read"]
    assert not status["connected"]
    await world.stop(task)
    assert await world.rows("SELECT count FROM overtone.api_usage") == [status["posts_read"]]


async def _is_capped(ingestion: Ingestion) -> bool:
    return "cap allows" in (ingestion.status()["last_error"] or "")
