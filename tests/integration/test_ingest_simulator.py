"""The simulator over HTTP: what each fault looks like to a client, and the calls beside the stream."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ingest.posts import Generator
from ingest.simulator import Simulator, SimulatorOptions
from ingest.simulator.scenario import parse_scenario
from ingest.waiting import until_true

HEADERS = {"Authorization": "Bearer t"}


class Server:
    """A simulator on a free port, with one rule."""

    def __init__(self, steps: Any = (), **options: Any) -> None:
        scenario = parse_scenario({"steps": list(steps)})
        self.simulator = Simulator(SimulatorOptions(**{"rate": 500.0, **options}), Generator(), scenario)
        self.runner = web.AppRunner(self.simulator.application(), handler_cancellation=True, shutdown_timeout=0.1)

    async def __aenter__(self) -> "Server":
        self.simulator.rulebook.change({"add": [{"value": "the", "tag": "all"}]})
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self.session = aiohttp.ClientSession(self.url, headers=HEADERS, read_bufsize=2**23)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        await self.runner.cleanup()

    async def fault(self, kind: str, **more: Any) -> bool:
        async with self.session.post("/simulator/faults", json={"kind": kind, **more}) as response:
            return bool((await response.json())["applied"])

    async def get(self, path: str, **parameters: Any) -> Any:
        async with self.session.get(path, params=parameters) as response:
            return await response.json()

    async def until_posts(self, count: int) -> None:
        async with asyncio.timeout(20):
            await until_true(lambda: self.simulator.timeline.end >= count)

    def stream(self, **parameters: Any) -> Any:
        return self.session.get("/2/tweets/search/stream", params=parameters)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as running:
        yield running


async def lines(response: aiohttp.ClientResponse, count: int) -> list[bytes]:
    """The next `count` lines that are no keep-alives, and never more than 20 s of waiting."""
    found: list[bytes] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            line = await response.content.readuntil(b"\r\n")
            if line.strip():
                found.append(line)
    return found


async def messages(response: aiohttp.ClientResponse, count: int) -> list[Any]:
    return [json.loads(line) for line in await lines(response, count)]


async def test_lines_can_be_spoilt_in_every_way(server: Server) -> None:
    async with server.stream() as response:
        await lines(response, 1)
        for kind, amount in (("missing_tag", 3), ("unknown_fields", 3), ("partial_error", 3), ("giant_line", 600_000)):
            assert await server.fault(kind, amount=amount)
        assert await server.fault("garbage", amount=2)
        assert await server.fault("error_line")
        raw = await lines(response, 400)
    bad = [line for line in raw if b"oops" in line]
    seen = [json.loads(line) for line in raw if b"oops" not in line]
    posts = [message for message in seen if "data" in message]
    assert len(bad) == 2
    assert sum("tag" not in message["matching_rules"][0] for message in posts) == 3
    assert sum("novelty" in message["data"] for message in posts) == 3
    assert sum("errors" in message for message in posts) == 3
    assert len(seen) - len(posts) == 1
    assert sum(600_000 <= len(line) < 600_100 for line in raw) == 1
    ids = [int(message["data"]["id"]) for message in posts]
    assert ids == sorted(set(ids))


async def test_posts_come_twice_and_out_of_order(server: Server) -> None:
    async with server.stream() as response:
        await lines(response, 100)
        assert await server.fault("duplicate", amount=40)
        assert await server.fault("out_of_order", amount=60)
        ids = [int(message["data"]["id"]) for message in await messages(response, 300)]
    assert len(ids) - len(set(ids)) <= 40
    steps_back = sum(later < earlier for earlier, later in itertools.pairwise(ids))
    assert steps_back > 10
    published = server.simulator.timeline.ids()
    assert set(ids) <= set(published)


async def test_characters_cut_in_two_are_whole_again_in_the_line(server: Server) -> None:
    await server.fault("split_utf8", amount=300)
    async with server.stream() as response:
        raw = await lines(response, 250)
    assert any(max(line) > 127 for line in raw)
    texts = [json.loads(line)["data"]["text"] for line in raw]
    assert not any("\ufffd" in text for text in texts)


async def test_slow_bytes_and_silence_hold_lines_back(server: Server) -> None:
    async with server.stream() as response:
        await lines(response, 1)
        assert await server.fault("slow", amount=0.5)
        assert await server.fault("stall", amount=0.3)
        assert [message["data"]["id"] for message in await messages(response, 300)]


async def test_the_stream_is_packed_for_who_takes_it() -> None:
    async with Server(gzips=True, keep_alive_s=0.1, limit=50) as server:
        async with server.stream() as response:
            assert response.headers["Content-Encoding"] == "gzip"
            assert len(await messages(response, 5)) == 5
            assert await asyncio.wait_for(response.content.readuntil(b"\r\n"), 20)
        assert await server.fault("gzip", amount=0)
        async with server.stream() as response:
            assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize(
    ("fault", "status", "found"),
    [
        ({"status": 503}, 503, "Service Unavailable"),
        ({"status": 401}, 401, "Unauthorized"),
        ({"status": 429}, 429, "Rate limit exceeded"),
        ({"status": 429, "reason": "too_many_connections"}, 429, "TooManyConnections"),
        ({"status": 429, "reason": "usage_cap"}, 429, "UsageCapExceeded"),
    ],
)
async def test_connections_are_refused_in_the_words_of_x(
    server: Server, fault: dict[str, Any], status: int, found: str
) -> None:
    await server.fault("refuse", **fault)
    async with server.stream() as response:
        assert (response.status, response.headers["x-rate-limit-limit"]) == (status, "50")
        assert found in await response.text()
    async with server.stream() as response:
        assert response.status == 200


async def test_one_connection_too_many_is_refused_or_replaces_the_first() -> None:
    async with Server() as server, server.stream() as first:
        await lines(first, 1)
        async with server.stream() as second:
            assert (second.status, (await second.json())["connection_issue"]) == (429, "TooManyConnections")
    async with Server(replaces_connection=True) as server, server.stream() as first:
        await lines(first, 1)
        async with server.stream() as second:
            assert second.status == 200
            async with asyncio.timeout(20):
                await first.content.read()
        assert server.simulator.ledger.most_attempts == 2


async def test_the_cap_ends_stream_and_search() -> None:
    async with Server(cap_posts=100) as server:
        async with server.stream() as response:
            seen = [json.loads(line) for line in (await asyncio.wait_for(response.content.read(), 20)).splitlines()]
        assert "disconnect_type" in seen[-1]["errors"][0]
        async with server.stream() as response:
            assert "UsageCapExceeded" in await response.text()
        assert (await server.get("/2/tweets/search/recent", query="the"))["title"] == "UsageCapExceeded"
        usage = await server.get("/2/usage/tweets")
        assert int(usage["data"]["project_usage"]) >= 100


async def test_search_has_a_window_of_its_own() -> None:
    async with Server(limits={"search": 2}) as server:
        answers = [await server.get("/2/tweets/search/recent", query="the") for _ in range(3)]
        assert ["errors" in answer for answer in answers] == [False, False, True]
        async with server.stream() as response:
            assert response.status == 200


async def test_rules_and_queries_are_evaluated_when_asked() -> None:
    async with Server(evaluates_rules=True, rate=2_000.0) as server:
        async with server.session.post(
            "/2/tweets/search/stream/rules", json={"add": [{"value": "flight OR gate"}, {"value": "has:feathers"}]}
        ) as response:
            answer = await response.json()
        assert answer["meta"]["summary"]["invalid"] == 1
        assert "has: with this value" in answer["errors"][0]["detail"]
        async with server.stream(**{"tweet.fields": "note_tweet"}) as response:
            seen = await messages(response, 20)
        for message in seen:
            text = message["data"].get("note_tweet", message["data"])["text"].lower()
            assert any(word in text for word in ("flight", "gate", "the"))
        found = await server.get("/2/tweets/search/recent", query="flight", **{"tweet.fields": "note_tweet"})
        assert all("flight" in str(post).lower() for post in found["data"])
        assert "title" in await server.get("/2/tweets/search/recent", query="sample:5 flight")


async def test_missed_posts_are_replayed_where_the_plan_has_it() -> None:
    async with Server(has_backfill=True) as server:
        await server.until_posts(50)
        first = server.simulator.timeline.post_id(0)
        async with server.stream(backfill_minutes="1") as response:
            assert int((await messages(response, 1))[0]["data"]["id"]) == first
        async with server.stream(start_time="2020-01-01T00:00:00Z", end_time="2021-01-01T00:00:00Z") as response:
            assert await asyncio.wait_for(response.content.read(), 20) == b""
        async with server.stream(backfill_minutes="9") as response:
            assert response.status == 400
    async with Server() as server, server.stream(backfill_minutes="1") as response:
        assert response.status == 400


async def test_what_is_deleted_is_neither_streamed_nor_found(server: Server) -> None:
    url = "/2/tweets/compliance/stream"
    await server.until_posts(50)
    ids = server.simulator.timeline.ids()[:10]
    wanted = [post_id for post_id in ids if post_id % 4 == 0]
    async with server.session.get(url, params={"partition": "1"}) as events:
        assert await server.fault("delete", ids=ids)
        seen = await messages(events, len(wanted))
    assert [int(event["data"]["delete"]["tweet"]["id"]) for event in seen] == wanted
    found = await server.get("/2/tweets/search/recent", query="x", max_results="100", until_id=str(ids[-1] + 1))
    assert found["meta"]["result_count"] == 0
    ledger = await server.get("/simulator/ledger", state="gone")
    assert [int(post_id) for post_id in ledger["ids"]] == ids
    assert ledger["faults"] == {"delete": 1}
    assert await server.fault("undrop", ids=ids[:1])
    assert len((await server.get("/simulator/ledger", state="gone"))["ids"]) == 9
    async with server.session.get(url) as response:
        assert response.status == 400


async def test_authors_go_and_come_back(server: Server) -> None:
    await server.until_posts(50)
    assert await server.fault("user_suspend", amount=2)
    gone = (await server.get("/simulator/ledger", state="gone"))["ids"]
    assert len(gone) >= 2
    assert await server.fault("user_unsuspend", amount=2)
    assert (await server.get("/simulator/ledger", state="gone"))["ids"] == []
    assert await server.fault("scrub_geo")
    kinds = [next(iter(event.line["data"])) for event in server.simulator.redactions.events.since(0)[1]]
    assert kinds == ["user_suspend"] * 2 + ["user_unsuspend"] * 2 + ["scrub_geo"]


async def test_a_batch_job_names_what_must_go(server: Server) -> None:
    await server.until_posts(20)
    ids = server.simulator.timeline.ids()[:10]
    await server.fault("delete", ids=ids[:3])
    async with server.session.post("/2/compliance/jobs", json={"type": "tweets", "name": "n"}) as response:
        job = (await response.json())["data"]
    body = "".join(f"{post_id}\r\n" for post_id in [*ids, 5])
    async with aiohttp.request("PUT", job["upload_url"], data=body) as response:
        assert response.status == 200
    assert (await server.get(f"/2/compliance/jobs/{job['id']}"))["data"]["status"] == "in_progress"
    assert (await server.get(f"/2/compliance/jobs/{job['id']}"))["data"]["status"] == "complete"
    assert (await server.get("/2/compliance/jobs", type="tweets"))["meta"]["result_count"] == 1
    async with aiohttp.request("GET", job["download_url"]) as response:
        actions = [json.loads(line) for line in (await response.text()).splitlines()]
    assert [(int(action["id"]), action["reason"]) for action in actions] == [(one, "deleted") for one in ids[:3]]


async def test_a_scenario_is_played() -> None:
    steps = [{"at_post": 100, "fault": "garbage", "amount": 2}, {"at": 0, "fault": "error_line"}]
    async with Server(steps) as server, server.stream() as response:
        raw = await lines(response, 200)
        assert sum(b"oops" in line for line in raw) == 2
        assert (await server.get("/simulator/ledger"))["scenario_is_over"]
        assert (await server.get("/simulator/ledger", limit="3"))["ids"] == [
            str(post_id) for post_id in server.simulator.timeline.ids()[:3]
        ]
