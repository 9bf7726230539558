"""The stream's supervisor and the X API's calls against the simulator, over real HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import aiohttp
import pytest
from aiohttp import web

from ingest.api import XApi
from ingest.backoff import Backoff, Failure
from ingest.connection import Connected, Disconnected, Inbox
from ingest.options import IngestOptions, RuleOption, StreamOptions
from ingest.posts import Generator
from ingest.simulator import Simulator, SimulatorOptions, main
from ingest.stream import StreamSupervisor
from ingest.waiting import until_true
from overtone.errors import StreamError, StreamFatalError

RULES = (RuleOption(tag="all", value="cat lang:en"),)


def chosen(plan: Literal["self_serve", "enterprise"] = "self_serve", **stream: Any) -> IngestOptions:
    return IngestOptions(
        plan=plan,
        rules=RULES,
        tweet_fields=("author_id",),
        expansions=("author_id",),
        stream=StreamOptions(**{"connects_per_window": 5_000, **stream}),
    )


class QuickBackoff(Backoff):
    """The same verdicts without the waits, which it notes."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[Failure, float]] = []

    def next_s(self, failure: Failure, at_least_s: float = 0.0) -> float:
        self.waits.append((failure, super().next_s(failure, at_least_s)))
        return 0.01


class Server:
    """The simulator on a free port, and what a test asks of it."""

    def __init__(self, **options: Any) -> None:
        self.simulator = Simulator(SimulatorOptions(**{"rate": 200.0, **options}), Generator())
        self.runner = web.AppRunner(self.simulator.application(), handler_cancellation=True, shutdown_timeout=0.1)

    async def __aenter__(self) -> "Server":
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self.session = aiohttp.ClientSession(self.url, headers={"Authorization": "Bearer t"})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        await self.runner.cleanup()

    async def fault(self, kind: str, **more: Any) -> bool:
        async with self.session.post("/simulator/faults", json={"kind": kind, **more}) as response:
            return bool((await response.json())["applied"])

    async def get(self, path: str, **parameters: Any) -> tuple[int, Any]:
        async with self.session.get(path, params=parameters) as response:
            return response.status, await response.json()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as running:
        yield running


class Held:
    """A supervisor at work on an inbox."""

    def __init__(self, server: Server, api: XApi, **options: Any) -> None:
        self.inbox: Inbox = asyncio.Queue(options.pop("queue_lines", 10_000))
        self.backoff = QuickBackoff()
        self.supervisor = StreamSupervisor(api, "t", options=chosen(**options), backoff=self.backoff)
        self.task = asyncio.create_task(self.supervisor.run(self.inbox))

    async def next(self, wanted: Callable[[object], bool]) -> object:
        async with asyncio.timeout(20):
            while True:
                event = await self.inbox.get()
                if wanted(event):
                    return event

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def hold(server: Server) -> AsyncIterator[Callable[..., Held]]:
    held: list[Held] = []
    async with XApi(server.url, "t") as api:

        def make(**options: Any) -> Held:
            held.append(Held(server, api, **options))
            return held[-1]

        yield make
        for one in held:
            await one.stop()


def is_line(event: object) -> bool:
    return isinstance(event, bytes)


def is_connected(event: object) -> bool:
    return isinstance(event, Connected)


def is_disconnected(event: object) -> bool:
    return isinstance(event, Disconnected)


async def test_lines_follow_the_mark_of_a_connection(hold: Callable[..., Held]) -> None:
    held = hold()
    async with asyncio.timeout(20):
        assert is_connected(await held.inbox.get())
        line = await held.inbox.get()
    assert isinstance(line, bytes)
    message = json.loads(line)
    assert message["data"]["author_id"] == message["includes"]["users"][0]["id"]
    assert message["matching_rules"][0]["tag"] == "all"
    assert held.supervisor.status.is_connected


@pytest.mark.parametrize(("fault", "cause"), [("disconnect", "closed"), ("close", "closed"), ("reset", "network")])
async def test_a_lost_connection_is_marked_and_replaced(
    server: Server, hold: Callable[..., Held], fault: str, cause: str
) -> None:
    held = hold()
    await held.next(is_line)
    assert await server.fault(fault)
    assert await held.next(is_disconnected) == Disconnected(cause)
    await held.next(is_connected)
    await held.next(is_line)
    assert server.simulator.connects == 2


async def test_bad_lines_do_not_end_the_stream(server: Server, hold: Callable[..., Held]) -> None:
    held = hold()
    await held.next(is_line)
    assert await server.fault("garbage", amount=3)
    for _ in range(3):
        await held.next(lambda event: isinstance(event, bytes) and b"oops" in event)
    await held.next(is_line)
    assert server.simulator.connects == 1


async def test_silence_ends_a_connection(server: Server, hold: Callable[..., Held]) -> None:
    held = hold(stall_s=0.5)
    await held.next(is_line)
    assert await server.fault("stall", amount=60)
    assert await held.next(is_disconnected) == Disconnected("stall")
    await held.next(is_line)


async def test_silence_is_noticed_within_25_seconds(server: Server, hold: Callable[..., Held]) -> None:
    """With the values that apply when nobody says otherwise, and after the last byte."""
    held = hold()
    await held.next(is_line)
    loop = asyncio.get_running_loop()
    assert await server.fault("stall", amount=60)
    began = loop.time()
    async with asyncio.timeout(40):
        assert isinstance(gone := await until_gone(held), Disconnected)
    assert gone == Disconnected("stall")
    assert 20 <= loop.time() - began <= 25


async def until_gone(held: Held) -> object:
    while not is_disconnected(event := await held.inbox.get()):
        pass
    return event


async def test_keep_alives_come_while_posts_are_for_others() -> None:
    """A rule that matches nothing must not look like a stream that is dead."""
    options = {"evaluates_rules": True, "keep_alive_s": 0.2}
    async with Server(**options) as server, XApi(server.url, "t") as api:
        held = Held(server, api, stall_s=1.0)
        await held.next(is_connected)
        for rule in server.simulator.rulebook.rules:
            server.simulator.rulebook.change({"delete": {"ids": [rule.rule_id]}}, dry_run=False)
        server.simulator.rulebook.change({"add": [{"value": "from:nobody"}]}, dry_run=False)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(held.next(is_disconnected), 2.5)
        await held.stop()


async def test_keep_alives_hold_a_quiet_connection() -> None:
    async with Server(limit=1, keep_alive_s=0.1) as server, XApi(server.url, "t") as api:
        held = Held(server, api, stall_s=1.0)
        await held.next(is_connected)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(held.next(is_disconnected), 2.0)
        assert server.simulator.connects == 1
        await held.stop()


async def test_passing_refusals_are_waited_out(server: Server, hold: Callable[..., Held]) -> None:
    await server.fault("refuse", amount=2, status=503)
    held = hold()
    await held.next(is_line)
    assert [failure for failure, _ in held.backoff.waits][:2] == [Failure.HTTP, Failure.HTTP]
    assert held.backoff.waits[1][1] >= 10


async def test_missing_rules_are_added_again(server: Server, hold: Callable[..., Held]) -> None:
    held = hold()
    await held.next(is_line)
    for rule in server.simulator.rulebook.rules:
        server.simulator.rulebook.change({"delete": {"ids": [rule.rule_id]}}, dry_run=False)
    await server.fault("close")
    await held.next(is_disconnected)
    await held.next(is_line)
    assert [rule.tag for rule in server.simulator.rulebook.rules] == ["all"]


async def test_a_stale_connection_is_ended(server: Server, hold: Callable[..., Held]) -> None:
    server.simulator.rulebook.change({"add": [RULES[0].model_dump()]}, dry_run=False)
    async with server.session.get("/2/tweets/search/stream") as stale:
        assert stale.status == 200
        held = hold()
        await held.next(is_line)
        assert [failure for failure, _ in held.backoff.waits] == [Failure.NETWORK]


async def test_a_full_inbox_is_drained_before_the_next_connection(server: Server, hold: Callable[..., Held]) -> None:
    held = hold(queue_lines=100)
    async with asyncio.timeout(20):
        await until_true(lambda: "faster" in (held.supervisor.status.last_error or ""))
    assert server.simulator.connects == 1
    assert await held.next(is_disconnected) == Disconnected("overflow")
    await held.next(is_connected)


async def test_an_api_that_hangs_up_at_once_is_not_hammered() -> None:
    asked: list[float] = []

    async def rules(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "1", **RULES[0].model_dump()}], "meta": {}})

    async def stream(_request: web.Request) -> web.Response:
        asked.append(asyncio.get_running_loop().time())
        return web.Response(text="\r\n")

    app = web.Application()
    app.router.add_get("/2/tweets/search/stream/rules", rules)
    app.router.add_get("/2/tweets/search/stream", stream)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with XApi(f"http://127.0.0.1:{runner.addresses[0][1]}", "t") as api:
        supervisor = StreamSupervisor(api, "t", options=chosen(connects_per_window=8))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(supervisor.run(asyncio.Queue(1_000)), 3.0)
    await runner.cleanup()
    assert 2 <= len(asked) <= 4


@pytest.mark.parametrize("token", ["wrong", ""])
async def test_a_refused_token_stops_for_good(token: str) -> None:
    async with Server(token="right") as server, XApi(server.url, token or "x") as api:
        held = Held(server, api)
        with pytest.raises(StreamFatalError, match="bearer token"):
            await asyncio.wait_for(held.task, 20)


async def test_rules_are_replaced_by_tag(server: Server) -> None:
    async with XApi(server.url, "t") as api:
        await api.reconcile_rules(RULES)
        await api.reconcile_rules((RuleOption(tag="all", value="dog"), RuleOption(tag="more", value="cat lang:en")))
        held = {(rule.tag, rule.value) for rule in server.simulator.rulebook.rules}
        assert held == {("all", "dog"), ("more", "cat lang:en")}
        with pytest.raises(StreamFatalError, match="pairs"):
            await api.reconcile_rules((RuleOption(tag="bad", value="(x"),))


async def test_search_pages_from_the_newest_back(server: Server) -> None:
    async with asyncio.timeout(20):
        await until_true(lambda: server.simulator.timeline.end >= 250)
    ids = server.simulator.timeline.ids()
    async with XApi(server.url, "t") as api:
        found: list[int] = []
        token = None
        while True:
            answer = await api.search_recent(
                "cat", since_id=ids[9], until_id=ids[240], next_token=token, fields={"tweet_fields": ["lang"]}
            )
            found += [int(post["id"]) for post in answer["data"]]
            token = answer["meta"].get("next_token")
            if token is None:
                break
        assert found == ids[239:9:-1]
        with pytest.raises(StreamError) as refused:
            await api.search_recent("cat", since_id=1, fields={})
        assert refused.value.details["status"] == 400


async def test_the_simulator_speaks_the_rest_of_the_api(server: Server, hold: Callable[..., Held]) -> None:
    held = hold()
    await held.next(is_line)
    status, usage = await server.get("/2/usage/tweets")
    assert (status, usage["data"]["project_cap"]) == (200, "3000000")
    _, connections = await server.get("/2/connections")
    assert connections["meta"]["result_count"] == 1
    _, ledger = await server.get("/simulator/ledger")
    assert ledger["published"] >= len(ledger["ids"]) > 0
    assert (await server.get("/2/tweets/search/recent"))[0] == 400
    assert (await server.get("/2/tweets/search/recent", query="x", max_results="5"))[0] == 400
    assert (await server.get("/simulator/ledger", since_id="x"))[0] == 400
    async with server.session.post("/simulator/faults", json={"kind": "nonsense"}) as response:
        assert response.status == 400
    async with aiohttp.ClientSession(server.url) as stranger, stranger.get("/2/usage/tweets") as response:
        assert response.status == 401


async def test_the_simulator_limits_connections_as_the_api_does() -> None:
    async with Server(connects_per_window=2) as server:
        await server.session.post("/2/tweets/search/stream/rules", json={"add": [{"value": "cat"}]})
        for _ in range(2):
            async with server.session.get("/2/tweets/search/stream") as response:
                assert response.status == 200
        async with server.session.get("/2/tweets/search/stream") as response:
            assert response.status == 429
            assert response.headers["x-rate-limit-remaining"] == "0"


def test_a_wrong_posts_file_stops_the_start(tmp_path: Any) -> None:
    assert main(["--port", "0", "--posts", str(tmp_path / "gone.csv")]) == 2
