"""A network that swallows everything and says nothing, between the leader and PostgreSQL, and between it and X."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web

from ingest.options import IngestOptions, LeaderOptions, RepairOptions, StreamOptions
from ingest.pipeline import Ingestion
from ingest.posts import Generator
from ingest.simulator import Simulator, SimulatorOptions
from overtone.db import Database
from overtone.db.gaps import list_gaps
from overtone.db.posts import cursor
from overtone.settings import load_settings

LEASE_S = 1.5
OPTIONS = IngestOptions(
    stream=StreamOptions(connects_per_window=1_000, stable_s=0.5, stall_s=2.0),
    repair=RepairOptions(overlap_s=1.0, settle_s=0.3, first_start_back_s=3_600.0),
    leader=LeaderOptions(lease_s=LEASE_S, poll_s=0.1),
    drain_s=1.0,
)


class Wire:
    """Carries bytes between TCP clients and a server, until it is cut: then nothing comes through and nothing ends."""

    def __init__(self, *, path: str | None = None, port: int | None = None) -> None:
        self._path, self._port = path, port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Wire":
        self._server = await asyncio.start_server(self._carry_both, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._is_whole.clear()

    def mend(self) -> None:
        self._is_whole.set()

    async def _carry_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._is_whole.wait()
        there, back = (
            await asyncio.open_unix_connection(self._path)
            if self._path
            else await asyncio.open_connection("127.0.0.1", self._port)
        )
        for ends in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._carry(*ends))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await self._is_whole.wait()
                sink.write(data)
                await sink.drain()
        # The end of a connection is news, too.
        await self._is_whole.wait()
        sink.close()


@pytest.fixture
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Simulator, int]]:
    replaces = bool(getattr(request, "param", False))
    made = Simulator(SimulatorOptions(rate=100.0, limit=2_000, replaces_connection=replaces), Generator())
    runner = web.AppRunner(made.application(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield made, runner.addresses[0][1]
    await runner.cleanup()


@contextlib.asynccontextmanager
async def running(url: str, x_port: int, home: Path) -> AsyncIterator[Ingestion]:
    settings = load_settings(
        overtone_home=home,
        twitter_bearer_token="t",
        x_api_base_url=f"http://127.0.0.1:{x_port}",
        database_url=url,
        api_port=1,
        overtone_api_key="ovt_none",
    )
    ingestion = Ingestion(settings, OPTIONS)
    task = asyncio.create_task(ingestion.run(asyncio.Event()))
    try:
        yield ingestion
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def stored(db: Database) -> list[int]:
    async with db.acquire() as connection:
        return [row[0] for row in await connection.fetch("SELECT post_id FROM overtone.posts")]


async def until_posts(db: Database, count: int) -> None:
    async with asyncio.timeout(60):
        while len(await stored(db)) < count:  # noqa: ASYNC110  a database says so
            await asyncio.sleep(0.05)


async def until_role(ingestion: Ingestion, role: str) -> None:
    async with asyncio.timeout(60):
        while ingestion.status().get("role") != role:  # noqa: ASYNC110  it spans pipelines
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("simulator", [False, True], indirect=True, ids=["refuses", "replaces"])
async def test_a_leader_cut_off_from_the_database_is_replaced_and_writes_nothing_more(
    simulator: tuple[Simulator, int], fresh_postgres_url: str, fresh_database: Database, tmp_path: Path
) -> None:
    """No packet tells anybody: PostgreSQL ends the session that it does not hear, the standby leads, and what the old
    leader had under way is refused when the network is back. Its own spool is stored, too, and nothing twice. The two
    do not fight over the stream, whether X refuses a second connection or ends the first for it.
    """
    made, port = simulator
    split = urlsplit(fresh_postgres_url)
    folder = parse_qs(split.query)["host"][0]
    async with Wire(path=f"{folder}/.s.PGSQL.5432") as wire:
        behind = f"postgresql://{split.username}@127.0.0.1:{wire.port}{split.path}"
        async with running(behind, port, tmp_path / "a") as first:
            await until_posts(fresh_database, 200)
            async with running(fresh_postgres_url, port, tmp_path / "b") as second:
                await until_role(second, "standby")
                wire.cut()
                began = asyncio.get_running_loop().time()
                await until_role(second, "leader")
                assert asyncio.get_running_loop().time() - began < LEASE_S + 5.0
                before = len(await stored(fresh_database))
                await until_posts(fresh_database, before + 200)
                wire.mend()
                await until_role(first, "standby")
                await until_posts(fresh_database, 2_000)
                assert second.status()["role"] == "leader"
                # Once the second leaves, the first may lead again, as a third.
                reached = await cursor(fresh_database, "simulator")
                assert reached is not None
                assert reached.epoch == 2
    assert sorted(await stored(fresh_database)) == made.timeline.ids()
    assert made.ledger.attempts <= 8
    assert {gap.state for gap in await list_gaps(fresh_database, "simulator")} <= {"repaired", "closed"}


async def test_a_stream_that_is_swallowed_is_left_and_repaired(
    simulator: tuple[Simulator, int], fresh_postgres_url: str, fresh_database: Database, tmp_path: Path
) -> None:
    """Neither end hears anything: the silence ends the connection, and X is told that the old one is stale."""
    made, port = simulator
    async with Wire(port=port) as wire, running(fresh_postgres_url, wire.port, tmp_path / "a") as only:
        await until_posts(fresh_database, 200)
        wire.cut()
        async with asyncio.timeout(30):
            while only.status()["connected"]:  # noqa: ASYNC110  it spans pipelines
                await asyncio.sleep(0.02)
        wire.mend()
        await until_posts(fresh_database, 2_000)
    assert sorted(await stored(fresh_database)) == made.timeline.ids()
    assert "stall" in {gap.cause for gap in await list_gaps(fresh_database, "simulator")}
