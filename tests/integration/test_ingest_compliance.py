"""What X's compliance streams and batch jobs ask for, done to a real database against the simulator."""

import asyncio
import base64
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ingest.compliance import Action, ComplianceApi, ComplianceKeeper, Enforcer, actions_of, actions_of_job, sweep
from ingest.options import ComplianceOptions
from ingest.parse import post_of
from ingest.posts import Generator
from ingest.simulator import Simulator, SimulatorOptions
from ingest.simulator.faults import Fault
from ingest.timeline import author_id_of
from ingest.waiting import until_true
from overtone.cli.app import app
from overtone.db import Database
from overtone.db.posts import write_posts
from overtone.erasure import Eraser, open_eraser
from overtone.errors import StreamError
from overtone.schema import Post
from overtone.settings import load_settings

FIELDS = frozenset({"author_id", "created_at", "lang", "geo"})
QUICK = ComplianceOptions(mode="stream", flush_s=0.02, poll_s=0.02, ids_per_job=40)


class World:
    """A simulator with a hundred posts, all of them stored."""

    def __init__(self, db: Database, home: Path) -> None:
        self.db = db
        key = base64.b64encode(b"c" * 32).decode()
        self.eraser: Eraser = open_eraser(load_settings(overtone_home=home, erasure_signing_key=key), db)
        options = SimulatorOptions(rate=1_000.0, limit=100, keep_alive_s=0.1, has_backfill=True)
        self.simulator = Simulator(options, Generator())
        self.runner = web.AppRunner(self.simulator.application(), handler_cancellation=True, shutdown_timeout=0.1)

    async def start(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        async with asyncio.timeout(20):
            await until_true(lambda: self.simulator.timeline.end == 100)
        assert await write_posts(self.db, self.posts, stream="s") == 100

    @property
    def posts(self) -> list[Post]:
        found = [post_of({"data": self.simulator.timeline.post(position, FIELDS)}) for position in range(100)]
        return [one for one in found if isinstance(one, Post)]

    async def stored(self) -> set[int]:
        async with self.db.acquire() as connection:
            return {row["post_id"] for row in await connection.fetch("SELECT post_id FROM overtone.posts")}

    async def places(self) -> int:
        async with self.db.acquire() as connection:
            return int(
                await connection.fetchval(
                    "SELECT count(*) FROM overtone.posts WHERE payload #> '{data,geo}' IS NOT NULL"
                )
            )

    def left(self) -> set[int]:
        return set(self.simulator.timeline.ids()) - set(self.simulator.ids("gone"))

    async def until_equal(self) -> None:
        async def is_equal() -> bool:
            return await self.stored() == self.left()

        await eventually(is_equal)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.05)


@pytest.fixture
async def world(fresh_database: Database, tmp_path: Path) -> AsyncIterator[World]:
    made = World(fresh_database, tmp_path)
    await made.start()
    yield made
    await made.runner.cleanup()


@contextlib.asynccontextmanager
async def keeping(world: World) -> AsyncIterator[asyncio.Task[None]]:
    keeper = ComplianceKeeper(world.url, "t", world.eraser, source="s", options=QUICK)
    task = asyncio.create_task(keeper.run())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_is_deleted_or_hidden_is_removed_as_it_is_told(world: World) -> None:
    async with keeping(world):
        await eventually(lambda: all_follow(world))
        for kind in ("delete", "drop", "user_suspend", "user_delete", "user_protect"):
            assert world.simulator.inflict(Fault(kind=kind, amount=5))
        await world.until_equal()
        assert 60 <= len(await world.stored()) < 90
        # Whatever a backfill finds now is refused, where it is gone.
        await write_posts(world.db, world.posts, stream="s_search")
        assert await world.stored() == world.left()


async def all_follow(world: World) -> bool:
    async with world.db.acquire() as connection:
        count = await connection.fetchval("SELECT count(*) FROM overtone.stream_cursor WHERE stream LIKE 's_comp%'")
        return bool(count == 8)


async def test_events_missed_while_away_are_asked_for_again(world: World) -> None:
    async with keeping(world):
        await eventually(lambda: all_follow(world))
    assert world.simulator.inflict(Fault(kind="delete", amount=10))
    async with keeping(world):
        await world.until_equal()


async def test_streams_that_end_at_once_are_not_hammered(fresh_database: Database, tmp_path: Path) -> None:
    asked: list[str] = []

    async def ends(request: web.Request) -> web.Response:
        asked.append(f"{request.path} {request.query['partition']}")
        return web.Response(text="\r\n")

    application = web.Application()
    for of in ("tweets", "users"):
        application.router.add_get(f"/2/{of}/compliance/stream", ends)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    eraser = open_eraser(load_settings(overtone_home=tmp_path), fresh_database)
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ComplianceKeeper(address, "t", eraser, source="s", options=QUICK).run(), 3.0)
    await runner.cleanup()
    # At once, and then after a quarter of a second more each time.
    assert set(Counter(asked).values()) <= {2, 3, 4, 5, 6}
    assert len(Counter(asked)) == 8


async def test_a_sweep_removes_what_is_gone(world: World) -> None:
    world.simulator.inflict(Fault(kind="delete", amount=7))
    world.simulator.inflict(Fault(kind="user_suspend", amount=3))
    authors = {one.author_id for one in world.posts if "geo" in one.payload["data"]}
    before = await world.places()
    world.simulator.inflict(Fault(kind="scrub_geo", ids=tuple(sorted(authors))))
    async with ComplianceApi(world.url, "t") as api:
        result = await sweep(api, Enforcer(world.eraser), world.eraser, QUICK)
        assert result.asked == 100
        assert {"deleted", "suspended"} <= set(result.reasons) <= {"deleted", "suspended", "scrub_geo"}
        assert await world.stored() == world.left()
        assert before == 0 or await world.places() == 0
        again = await sweep(api, Enforcer(world.eraser), world.eraser, QUICK)
        assert set(again.reasons) <= {"scrub_geo"}


async def test_the_command_sweeps_once(
    world: World, fresh_postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quick.yaml").write_text("compliance: {poll_s: 0.05}")
    for name, value in {
        "DATABASE_URL": fresh_postgres_url,
        "X_API_BASE_URL": world.url,
        "TWITTER_BEARER_TOKEN": "t",
        "OVERTONE_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(name, value)
    world.simulator.inflict(Fault(kind="delete", amount=7))
    arguments = ["compliance", "sweep", "--json", "--ingest", str(tmp_path / "quick.yaml")]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert json.loads(done.stdout) == {"asked": 100, "reasons": {"deleted": 7}}
    assert await world.stored() == world.left()


async def test_a_sweep_that_is_refused_says_so(world: World) -> None:
    await world.runner.cleanup()
    async with ComplianceApi(world.url, "t") as api:
        with pytest.raises(StreamError, match="cannot be reached"):
            await sweep(api, Enforcer(world.eraser), world.eraser, QUICK)


async def test_authors_who_come_back_are_stored_again(world: World) -> None:
    enforcer, one = Enforcer(world.eraser), world.posts[0]
    await enforcer.enforce([Action("erase_author", one.author_id, "suspended")])
    newer = Post(one.post_id + 1, one.author_id, "later", one.created_at)
    assert await write_posts(world.db, [newer], stream="s") == 0
    await enforcer.enforce([Action("admit_author", one.author_id, "protected")])
    assert await write_posts(world.db, [newer], stream="s") == 0
    await enforcer.enforce([Action("admit_author", one.author_id, "suspended")])
    assert await write_posts(world.db, [newer], stream="s") == 1


async def test_an_edited_post_loses_its_earlier_versions(world: World) -> None:
    ids = [one.post_id for one in world.posts[:3]]
    line = {"data": {"tweet_edit": {"tweet": {"id": str(ids[2]), "edit_tweet_ids": [str(one) for one in ids]}}}}
    await Enforcer(world.eraser).enforce(actions_of(json.dumps(line).encode()))
    assert ids[2] in await world.stored()
    assert not {ids[0], ids[1]} & await world.stored()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"delete": {"tweet": {"id": "5", "author_id": "7"}}}, Action("erase_post", 5, "deleted", 7)),
        ({"undrop": {"tweet": {"id": "5"}}}, Action("admit_post", 5, "dropped")),
        ({"withheld": {"tweet": {"id": "5"}, "withheld_in_countries": ["XX"]}}, Action("erase_post", 5, "withheld")),
        ({"user_unsuspend": {"user": {"id": "7"}}}, Action("admit_author", 7, "suspended")),
        (
            {"scrub_geo": {"user": {"id": "7"}, "up_to_tweet_id": "9"}},
            Action("scrub_author", 7, "scrub_geo", up_to_post_id=9),
        ),
    ],
)
def test_events_are_read(line: dict[str, Any], expected: Action) -> None:
    assert actions_of(json.dumps({"data": line}).encode()) == [expected]


@given(st.binary(max_size=80))
def test_no_line_breaks_the_reader(raw: bytes) -> None:
    for read in (actions_of, actions_of_job):
        with contextlib.suppress(ValueError):
            read(raw)


def test_other_events_and_keep_alives_change_nothing() -> None:
    assert actions_of(b"\r\n") == []
    assert actions_of(b'{"data": {"user_profile_modification": {"user": {"id": "7"}}}}') == []
    assert author_id_of(0) > 0
