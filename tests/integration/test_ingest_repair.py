"""How gaps are filled by what each plan has, and how each of them ends, from the simulator into PostgreSQL."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ingest.options import IngestOptions, RepairOptions, RuleOption, StreamOptions
from ingest.pipeline import Ingestion
from ingest.posts import Draft, Generator, PostSource
from ingest.simulator import Simulator, SimulatorOptions
from ingest.timeline import author_id_of
from overtone.db import Database
from overtone.db.gaps import Gap, close_gap, list_gaps, open_gap
from overtone.db.posts import write_posts
from overtone.erasure import open_eraser
from overtone.receipts import public_key, signing_key, verify
from overtone.schema import Post, datetime_to_snowflake
from overtone.settings import Settings, load_settings
from overtone.spool import Record, Spool

from aiohttp import web  # isort: skip

QUICK = RepairOptions(overlap_s=2.0, settle_s=0.5, first_start_back_s=0.0)


def options(plan: str = "self_serve", **more: Any) -> IngestOptions:
    stream = StreamOptions(connects_per_window=more.pop("connects_per_window", 1_000), stable_s=0.5, stall_s=3.0)
    return IngestOptions(**{"plan": plan, "stream": stream, "repair": QUICK, "drain_s": 2.0, **more})


class Surroundings:
    """A simulator and a database; nobody classifies."""

    def __init__(self, url: str, home: Path, db: Database) -> None:
        self.url, self.home, self.db = url, home, db
        self._stack = contextlib.AsyncExitStack()
        self._running: list[asyncio.Task[None]] = []

    async def start_simulator(self, source: PostSource | None = None, **chosen: Any) -> Simulator:
        self.simulator = Simulator(
            SimulatorOptions(**{"rate": 100.0, "keep_alive_s": 0.5, "limits": {"connections": 100_000}, **chosen}),
            source or Generator(),
        )
        runner = web.AppRunner(self.simulator.application(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        headers = {"Authorization": "Bearer t"}
        self.http = await self._stack.enter_async_context(aiohttp.ClientSession(address, headers=headers))
        self.settings: Settings = load_settings(
            overtone_home=self.home,
            twitter_bearer_token="t",
            x_api_base_url=address,
            database_url=self.url,
            api_port=1,
            overtone_api_key="ovt_none",
        )
        return self.simulator

    def start(self, chosen: IngestOptions) -> tuple[Ingestion, asyncio.Task[None]]:
        ingestion = Ingestion(self.settings, chosen)
        task = asyncio.create_task(ingestion.run(asyncio.Event()))
        self._running.append(task)
        return ingestion, task

    async def crash(self, task: asyncio.Task[None]) -> None:
        self._running.remove(task)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        for task in list(self._running):
            await self.crash(task)
        await self._stack.aclose()

    async def fault(self, kind: str, **more: Any) -> bool:
        async with self.http.post("/simulator/faults", json={"kind": kind, **more}) as response:
            return bool((await response.json())["applied"])

    async def connections(self) -> int:
        async with self.http.get("/2/connections") as response:
            return int((await response.json())["meta"]["result_count"])

    async def stored(self) -> set[int]:
        async with self.db.acquire() as connection:
            return {row[0] for row in await connection.fetch("SELECT post_id FROM overtone.posts")}

    async def gaps(self) -> list[Gap]:
        return await list_gaps(self.db, "simulator", limit=1_000)

    async def leave_cursor(self, back: timedelta, stream: str = "simulator") -> int:
        """A cursor as of some time ago, with one post that the simulator does not know; its id."""
        moment = datetime.now(UTC) - back
        left = Post(datetime_to_snowflake(moment), 7, "the last one", moment)
        await write_posts(self.db, [left], stream=stream)
        return left.post_id

    async def until_settled(self, count: int = 1) -> list[Gap]:
        """The gaps, once there are `count` and each has an ending."""

        async def is_settled() -> bool:
            gaps = await self.gaps()
            return len(gaps) >= count and all(gap.state not in ("open", "closed") for gap in gaps)

        await eventually(is_settled)
        return await self.gaps()

    async def until_all_stored(self, since: int = 0) -> None:
        async def is_whole() -> bool:
            wanted = {one for one in self.simulator.timeline.ids() if one > since}
            return wanted <= await self.stored()

        await eventually(is_whole)


async def eventually(holds: Callable[[], Awaitable[bool]], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110  it spans processes and a database
            await asyncio.sleep(0.05)


@pytest.fixture
async def around(fresh_postgres_url: str, fresh_database: Database, tmp_path: Path) -> AsyncIterator[Surroundings]:
    made = Surroundings(fresh_postgres_url, tmp_path / "home", fresh_database)
    yield made
    await made.close()


async def test_a_short_gap_comes_with_the_next_connection(around: Surroundings) -> None:
    """Enterprise: X sends again what was missed, and nothing is searched for."""
    simulator = await around.start_simulator(limit=2_500, has_backfill=True)
    around.start(options("enterprise"))
    for number in (1, 2):
        before = len(await around.stored())
        await eventually(lambda before=before: reaches(around, before + 100))  # type: ignore[misc]
        await around.fault("refuse", amount=1, status=503)
        await around.fault("close")
        await around.until_settled(number)
    gaps = await around.until_settled(2)
    assert {(gap.state, gap.means, gap.cause) for gap in gaps} == {("repaired", "backfill", "closed")}
    await around.until_all_stored(min(await around.stored()) - 1)
    assert simulator.ledger.found == 0
    assert sum(gap.repaired_posts for gap in gaps) > 0


async def reaches(around: Surroundings, count: int) -> bool:
    return len(await around.stored()) >= count


async def test_a_backfill_that_is_cut_off_is_replayed(around: Surroundings) -> None:
    simulator = await around.start_simulator(limit=2_000, has_backfill=True)
    patient = RepairOptions(overlap_s=2.0, settle_s=4.0)
    around.start(options("enterprise", repair=patient))
    await eventually(lambda: reaches(around, 100))
    await around.fault("refuse", amount=1, status=503)
    await around.fault("close")
    await eventually(lambda: is_connected_again(simulator, 2))
    await around.fault("reset")
    gaps = await around.until_settled(2)
    assert {gap.state for gap in gaps} == {"repaired"}
    assert "replay" in {gap.means for gap in gaps}
    await around.until_all_stored(min(await around.stored()) - 1)
    assert simulator.ledger.found == 0


async def is_connected_again(simulator: Simulator, times: int) -> bool:
    return simulator.connects >= times


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_gap_of_half_an_hour_is_replayed(around: Surroundings, is_cut: bool) -> None:
    """Over a connection of its own, beside the live stream; one that is cut off is asked for again from its end."""
    simulator = await around.start_simulator(rate=20.0, history_s=1_800.0, has_backfill=True)
    since = await around.leave_cursor(timedelta(minutes=20))
    around.start(options("enterprise"))
    if is_cut:
        await eventually(lambda: is_replaying(around))
        await around.fault("close")
    gaps = await around.until_settled(1)
    assert {(gap.state, gap.means) for gap in gaps if gap.cause == "restart"} == {("repaired", "replay")}
    assert max(gap.repaired_posts for gap in gaps) >= 10_000
    await around.until_all_stored(since)
    assert simulator.ledger.found == 0


async def is_replaying(around: Surroundings) -> bool:
    return await around.connections() == 2 and around.simulator.ledger.streamed > 200


async def test_without_the_plan_the_same_gap_is_searched(around: Surroundings) -> None:
    simulator = await around.start_simulator(rate=2.0, history_s=1_800.0)
    since = await around.leave_cursor(timedelta(minutes=20))
    around.start(options())
    [gap] = await around.until_settled(1)
    assert (gap.state, gap.means, gap.reason) == ("repaired", "search", None)
    await around.until_all_stored(since)
    assert simulator.ledger.found >= gap.repaired_posts >= 2_300


@pytest.mark.parametrize(
    ("back", "more", "state", "reason"),
    [
        (timedelta(days=8), {}, "partly_repaired", "seven days"),
        (timedelta(minutes=2), {"rules": (RuleOption(tag="a", value="cat"),)}, "partly_repaired", "retweets"),
        (timedelta(minutes=2), {"rules": (RuleOption(tag="a", value="cat sample:5"),)}, "accepted", "operators"),
        (timedelta(minutes=2), {"repair": RepairOptions(enabled=False)}, "accepted", "turned off"),
    ],
)
async def test_a_gap_that_cannot_be_filled_says_why(
    around: Surroundings, back: timedelta, more: dict[str, Any], state: str, reason: str
) -> None:
    await around.start_simulator(rate=5.0, history_s=120.0)
    await around.leave_cursor(back)
    around.start(options(**more))
    [gap] = await around.until_settled(1)
    assert gap.state == state
    assert reason in (gap.reason or "")
    assert (gap.repaired_posts > 0) == (state == "partly_repaired")


async def test_an_app_that_may_not_search_goes_on_reading(around: Surroundings) -> None:
    await around.start_simulator(rate=50.0, history_s=60.0)
    await around.leave_cursor(timedelta(minutes=2))
    await around.fault("search_down", amount=3_600, status=403)
    ingestion, _ = around.start(options())
    [gap] = await around.until_settled(1)
    assert (gap.state, gap.reason) == ("accepted", "X refuses the search")
    before = len(await around.stored())
    await eventually(lambda: reaches(around, before + 50))
    assert ingestion.status()["connected"]


async def test_a_process_that_dies_again_and_again_keeps_within_the_allowance(around: Surroundings) -> None:
    simulator = await around.start_simulator(rate=5.0)
    for _ in range(20):
        ingestion, task = around.start(options(connects_per_window=10))
        await eventually(lambda ingestion=ingestion: has_tried(ingestion))  # type: ignore[misc]
        await around.crash(task)
    assert 5 <= simulator.ledger.attempts <= 10


async def has_tried(ingestion: Ingestion) -> bool:
    status = ingestion.status()
    return bool(status["connected"] or status.get("waiting_s"))


async def test_partitions_are_read_side_by_side(around: Surroundings) -> None:
    """Each has a leader, a cursor and a ledger of its own; together they bring every post of the stream."""
    simulator = await around.start_simulator(rate=200.0, limit=1_000, has_backfill=True)
    left = set()
    for number in (1, 2, 3):
        left.add(await around.leave_cursor(timedelta(seconds=20 + number), f"simulator_firehose_{number}"))
        chosen = StreamOptions(endpoint="firehose", partition=number, connects_per_window=1_000)
        around.start(options("enterprise", stream=chosen))
    await eventually(lambda: is_published(simulator, 1_000))
    wanted = {one for at, one in enumerate(simulator.timeline.ids()) if at % 20 < 3}

    async def is_whole() -> bool:
        return await around.stored() == wanted | left

    await eventually(is_whole)
    async with around.db.acquire() as connection:
        rows = await connection.fetch("SELECT stream, count(*) FROM overtone.posts GROUP BY stream")
    assert {row[0]: row[1] for row in rows} == {f"simulator_firehose_{number}": 51 for number in (1, 2, 3)}


async def is_published(simulator: Simulator, count: int) -> bool:
    return simulator.timeline.end >= count


class OneVoice:
    """Nineteen of twenty posts are of the author 42."""

    def __init__(self) -> None:
        self._posts = Generator()

    def draft(self, index: int) -> Draft:
        return Draft(**{**asdict(self._posts.draft(index)), "author": self.author(index)})

    def author(self, index: int) -> int:
        return 42 if index % 20 else 43


async def test_a_search_brings_back_nothing_of_an_author_who_was_erased(around: Surroundings) -> None:
    """10,000 posts: gone from tables, from what waits on disk, and from files; and a search over all of them, which
    does bring back what was lost otherwise, finds them and stores none.
    """
    simulator = await around.start_simulator(OneVoice(), rate=100.0, history_s=106.0, limit=10_600)
    everything = options(repair=RepairOptions(overlap_s=2.0, settle_s=0.5, first_start_back_s=3_600.0))
    _, task = around.start(everything)
    await around.until_all_stored()
    await around.crash(task)
    positions = range(simulator.timeline.start, simulator.timeline.end)
    theirs = {simulator.timeline.post_id(at) for at in positions if at % 20}
    assert len(theirs) >= 10_000
    author = author_id_of(42)
    waiting = Spool.claim(around.home / "spool", "simulator", 2**24)
    ids = sorted(theirs)[:50]
    lines = [{"data": {"id": str(one), "author_id": str(author), "text": "again"}} for one in ids]
    waiting.append([Record(0, json.dumps(line).encode()) for line in lines])
    waiting.close()
    jobs = around.home / "jobs"
    jobs.mkdir()
    (jobs / "scores.jsonl").write_text("".join(f'{{"post_id": "{one}", "label": "positive"}}\n' for one in ids))

    async with asyncio.timeout(60):
        receipt = await open_eraser(around.settings, around.db).erase("author", author, actor="test")

    body = verify(receipt, public_key(signing_key(around.settings)))
    assert body["removed"]["posts"] == len(theirs)
    assert body["removed"]["lines_of_files"] == 100
    assert set(body["left"].values()) == {0}
    assert await around.stored() & theirs == set()
    for path in around.home.rglob("*"):
        assert not path.is_file() or str(author).encode() not in path.read_bytes()
    async with around.db.acquire() as connection:
        await connection.execute("DELETE FROM overtone.posts")
    found = simulator.ledger.found
    gap = await open_gap(around.db, "simulator", "lost", after_post_id=min(theirs) - 2**32)
    await close_gap(around.db, gap, before_post_id=max(theirs) + 2**32)
    around.start(everything)
    others = set(simulator.timeline.ids()) - theirs

    async def is_back() -> bool:
        return others <= await around.stored()

    await eventually(is_back)
    await around.until_settled(1)
    assert simulator.ledger.found >= found + len(theirs)
    assert await around.stored() & theirs == set()
