"""Options, streamed batches, packed bodies and the Open Inference Protocol over ASGI, with a tiny bundle."""

import asyncio
import gzip
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from hashlib import sha256
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from overtone.bundle import Bundle
from overtone.engine import Engine, Probabilities, open_engine
from serve.auth import Gate, Identity, KeyRing
from serve.batcher import Limits
from serve.classifier import Classifier
from serve.http import create_app
from serve.service import Service

SECRET = "ovt_a-key"
JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/x-ndjson"}
INFER = b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["love"]}]}'
LONG = "love love love love love love hate hate"


class OneKey:
    """The store of one key."""

    async def active(self) -> Mapping[bytes, Identity]:
        return {sha256(SECRET.encode()).digest(): Identity("key", frozenset({"predict", "read"}))}

    async def find(self, digest: bytes) -> Identity | None:
        return None


async def opened(
    bundle: Bundle | None, limits: Limits | None = None, engine_for: Callable[[Bundle, int], Engine] = open_engine
) -> tuple[Service, httpx.AsyncClient]:
    classifier = Classifier(limits=limits, engine_for=engine_for)
    if bundle is not None:
        await classifier.load(bundle.path)
    keys = KeyRing(OneKey())
    await keys.refresh()
    service = Service(classifier=classifier, gate=Gate(keys), records=None)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(create_app(service))
    headers = {"x-api-key": SECRET, "accept-encoding": "identity"}
    return service, httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


class HeldEngine:
    """The engine of a bundle, which waits when told to."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._engine = open_engine(bundle, threads)
        self.labels = self._engine.labels
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_waiting = False

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.is_waiting = not self.may_go_on.is_set()
        assert self.may_go_on.wait(30)
        return self._engine.classify(token_ids)

    def close(self) -> None:
        self._engine.close()


async def held(bundle: Bundle, limits: Limits | None = None) -> tuple[Service, httpx.AsyncClient, HeldEngine]:
    """A service whose engine has begun a request and waits."""
    engines: list[HeldEngine] = []

    def open_held(bundle: Bundle, threads: int) -> HeldEngine:
        engines.append(HeldEngine(bundle, threads))
        return engines[0]

    service, client = await opened(bundle, limits, open_held)
    engines[0].may_go_on.clear()
    return service, client, engines[0]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (what is waited for is state of the code under test)
            await asyncio.sleep(0)


@pytest.fixture
async def client(tiny_bundle: Bundle) -> AsyncIterator[httpx.AsyncClient]:
    service, client = await opened(tiny_bundle)
    yield client
    await client.aclose()
    await service.classifier.close()


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [orjson.loads(line) for line in response.content.splitlines()]


# --- options


async def test_the_best_labels_first(client: httpx.AsyncClient) -> None:
    body = (await client.post("/predict", json={"text": "hate", "top_k": 2})).json()

    assert next(iter(body["scores"])) == body["label"] == "negative"
    assert len(body["scores"]) == 2
    refused = await client.post("/predict", json={"text": "hate", "top_k": 4})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "top_k")


async def test_abstaining_keeps_the_scores(client: httpx.AsyncClient) -> None:
    unsure = (await client.post("/predict", json={"text": "fine", "threshold": 1})).json()
    sure = (await client.post("/predict", json={"text": "hate", "threshold": 0.1})).json()

    assert (unsure["label"], unsure["abstained"], len(unsure["scores"])) == (None, True, 3)
    assert (sure["label"], sure["abstained"]) == ("negative", False)


async def test_long_texts_by_policy(client: httpx.AsyncClient) -> None:
    by_policy = {
        policy: await client.post("/predict", json={"text": LONG, "long_text": policy})
        for policy in ("truncate", "window", "reject")
    }

    assert by_policy["truncate"].json()["confidence"] > by_policy["window"].json()["confidence"]
    assert by_policy["reject"].status_code == 422
    assert "10 tokens, at most 8" in by_policy["reject"].json()["detail"]
    batch = await client.post("/predict/batch?long_text=reject", json={"texts": ["love", LONG]})
    assert [next(iter(item)) for item in batch.json()["predictions"]] == ["label", "error"]


async def test_the_word_that_counts_is_named(client: httpx.AsyncClient) -> None:
    body = (await client.post("/predict", json={"text": "it love", "explain": True})).json()
    batch = (await client.post("/predict/batch", json={"texts": ["hate it", "love"], "explain": True})).json()

    best = max(body["explanation"], key=lambda item: item["contribution"])
    assert (best["token"], best["start"], best["end"]) == ("love", 3, 7)
    assert best["contribution"] > 0
    assert [len(item["explanation"]) for item in batch["predictions"]] == [2, 1]
    many = await client.post("/predict/batch", json={"texts": ["love"] * 17, "explain": True})
    assert (many.status_code, many.json()["errors"][0]["limit"]) == (422, 16)


# --- deadlines


CALLS = [
    ("/predict", b'{"text": "love"}', JSON),
    ("/predict", b'{"text": "love", "top_k": 1}', JSON),
    ("/predict/batch", b'{"texts": ["love"]}', JSON),
    ("/predict/batch", b'"love"\n', LINES),
    ("/v2/models/overtone/infer", INFER, JSON),
]


@pytest.mark.parametrize(("path", "body", "headers"), CALLS)
async def test_the_caller_says_how_long_it_waits(
    client: httpx.AsyncClient, path: str, body: bytes, headers: dict[str, str]
) -> None:
    async def status_for(seconds: str) -> int:
        answer = await client.post(path, content=body, headers=headers | {"X-Request-Timeout-S": seconds})
        return answer.status_code

    assert [await status_for(seconds) for seconds in ("9", "1e3", "2.5")] == [200, 200, 200]
    assert {await status_for(seconds) for seconds in ("", "0", "1e-3", "-1", "nan", "inf", "1_0", "soon")} == {422}


async def test_texts_that_reach_no_engine_in_time_are_given_up(tiny_bundle: Bundle) -> None:
    service, client, engine = await held(tiny_bundle)
    running = asyncio.create_task(client.post("/predict", json={"text": "love"}))
    await until(lambda: engine.is_waiting)
    waiting = asyncio.create_task(
        client.post("/predict", json={"text": "hate"}, headers={"X-Request-Timeout-S": "0.01"})
    )
    await until(lambda: service.classifier.waiting)
    too_late = time.monotonic() + 0.02
    await until(lambda: time.monotonic() > too_late)
    engine.may_go_on.set()
    answers = [await running, await waiting]
    await service.classifier.close()

    assert [answer.status_code for answer in answers] == [200, 504]
    assert answers[1].json()["code"] == "deadline_exceeded"


async def test_what_the_queue_cannot_take_is_refused_while_the_engine_works(tiny_bundle: Bundle) -> None:
    service, client, engine = await held(tiny_bundle, Limits(max_interactive_texts=1))
    running = asyncio.create_task(client.post("/predict", json={"text": "love"}))
    await until(lambda: engine.is_waiting)
    waiting = asyncio.create_task(client.post("/predict", json={"text": "hate"}))
    await until(lambda: service.classifier.waiting)
    refused = await client.post("/predict", json={"text": "fine"})
    assert not engine.may_go_on.is_set()
    engine.may_go_on.set()
    answers = [await running, await waiting]
    await service.classifier.close()

    assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.json()["label"] for answer in answers] == ["positive", "negative"]


async def test_a_service_that_ends_answers_what_it_took_and_refuses_the_rest(tiny_bundle: Bundle) -> None:
    service, client, engine = await held(tiny_bundle)
    taken = asyncio.create_task(client.post("/predict", json={"text": "love"}))
    await until(lambda: engine.is_waiting)
    closing = asyncio.create_task(service.classifier.close())
    for _ in range(5):  # `close` begins, and stops where it waits
        await asyncio.sleep(0)
    refused = await client.post("/predict", json={"text": "hate"})
    assert not closing.done()
    engine.may_go_on.set()
    await closing

    assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await taken).json()["label"] == "positive"


# --- streamed batches


async def test_lines_are_answered_in_order_and_bad_ones_alone(client: httpx.AsyncClient) -> None:
    body = b'{"text": "love"}\n"hate"\n\nnonsense\n{"text": 1}\n"' + b"x" * 400_000 + b'"\n"fine"'
    first, second, bad, wrong, over, last = lines_of(await client.post("/predict/batch", content=body, headers=LINES))

    assert [item["label"] for item in (first, second, last)] == ["positive", "negative", "neutral"]
    assert [(item["line"], item["error"]["status"]) for item in (bad, wrong, over)] == [(4, 400), (5, 422), (6, 413)]


async def test_thousands_of_lines_through_a_small_queue(tiny_bundle: Bundle) -> None:
    service, client = await opened(tiny_bundle, Limits(max_bulk_texts=1))
    words = ["love", "hate", "fine"] * 1000

    async def body() -> AsyncIterator[bytes]:
        for start in range(0, len(words), 50):
            yield b"".join(orjson.dumps(word) + b"\n" for word in words[start : start + 50])

    answers = lines_of(await client.post("/predict/batch?top_k=1", content=body(), headers=LINES))
    await service.classifier.close()

    assert [item["label"][0] for item in answers] == ["p", "n", "n"] * 1000
    assert {len(item["scores"]) for item in answers} == {1}


async def test_packed_lines_both_ways(client: httpx.AsyncClient) -> None:
    body = gzip.compress(b'"love"\n' * 1000)
    headers = LINES | {"content-encoding": "gzip", "accept-encoding": "gzip"}
    response = await client.post("/predict/batch", content=body, headers=headers)

    assert response.headers["content-encoding"] == "gzip"
    assert [item["label"] for item in lines_of(response)] == ["positive"] * 1000
    cut = await client.post("/predict/batch", content=gzip.compress(b'"love"\n"hate"\n')[:-4], headers=headers)
    assert cut.status_code == 200
    assert orjson.loads(cut.content.splitlines()[-1])["error"]["code"] == "malformed"


async def test_errors_before_the_first_line_have_their_status(client: httpx.AsyncClient) -> None:
    asked = {
        "/predict/batch": (400, LINES | {"content-encoding": "gzip"}),
        "/predict/batch?x=1": (422, LINES),
        "/predict/batch?top_k=9": (422, LINES),
        "/predict/batch?explain=true": (422, LINES),
        "/predict/batch?top_k=1": (415, LINES | {"content-encoding": "br"}),
    }
    for path, (status, headers) in asked.items():
        assert (await client.post(path, content=b'"love"\n', headers=headers)).status_code == status
    _, unready = await opened(None)
    assert (await unready.post("/predict/batch", content=b'"love"', headers=LINES)).status_code == 503
    assert lines_of(await client.post("/predict/batch", content=b"", headers=LINES)) == []


async def exchange(app: Any, incoming: "asyncio.Queue[Any]", outgoing: "asyncio.Queue[Any]") -> None:
    headers = [(b"content-type", b"application/x-ndjson"), (b"x-api-key", SECRET.encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict/batch", "query_string": b"", "headers": headers}
    await app(scope, incoming.get, outgoing.put)


async def test_answers_flow_before_the_body_ends_and_stop_when_the_client_leaves(tiny_bundle: Bundle) -> None:
    service, _ = await opened(tiny_bundle)
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    outgoing: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.create_task(exchange(create_app(service), incoming, outgoing))
    for word in (b"love", b"hate"):
        await incoming.put({"type": "http.request", "body": b'"%s"\n' % word, "more_body": True})
        message = await asyncio.wait_for(outgoing.get(), 10)
        if message["type"] == "http.response.start":
            message = await asyncio.wait_for(outgoing.get(), 10)
        assert orjson.loads(message["body"])["label"] in {"positive", "negative"}
    await incoming.put({"type": "http.disconnect"})
    await asyncio.wait_for(task, 10)

    assert service.classifier.waiting == 0
    assert outgoing.empty()


async def test_a_client_that_reads_nothing_is_not_read_from(tiny_bundle: Bundle) -> None:
    service, _ = await opened(tiny_bundle)
    taken = 0
    is_stuck = asyncio.Event()

    async def receive() -> Any:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b'"love"\n' * 500, "more_body": True}

    async def send(_: Any) -> None:
        is_stuck.set()
        await asyncio.Event().wait()

    headers = [(b"content-type", b"application/x-ndjson"), (b"x-api-key", SECRET.encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict/batch", "query_string": b"", "headers": headers}
    task = asyncio.create_task(create_app(service)(scope, receive, send))  # type: ignore[arg-type]
    await asyncio.wait_for(is_stuck.wait(), 10)
    seen = -1
    while seen != taken or service.classifier.waiting:
        seen = taken
        for _ in range(200):
            await asyncio.sleep(0)
    assert taken < 10
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# --- packed bodies


@pytest.mark.parametrize(("path", "body"), [("/predict", {"text": "love"}), ("/predict/batch", {"texts": ["love"]})])
async def test_packed_bodies(client: httpx.AsyncClient, path: str, body: Any) -> None:
    packed = gzip.compress(orjson.dumps(body))
    headers = {"content-type": "application/json", "content-encoding": "gzip"}

    assert (await client.post(path, content=packed, headers=headers)).status_code == 200
    assert (await client.post(path, content=packed[:-2], headers=headers)).status_code == 400
    headers["content-encoding"] = "deflate"
    assert (await client.post(path, content=packed, headers=headers)).status_code == 415


async def test_a_bomb_is_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    bomb = gzip.compress(b'{"text": "' + b" " * 70_000_000 + b'"}', 1)
    assert (await client.post("/predict", content=bomb, headers=headers)).status_code == 413


async def test_large_answers_are_packed_and_small_ones_not(client: httpx.AsyncClient) -> None:
    ask = {"accept-encoding": "gzip"}
    large = await client.post("/predict/batch", json={"texts": ["love"] * 50}, headers=ask)
    small = await client.post("/predict/batch", json={"texts": ["love"]}, headers=ask)
    schema = await client.get("/openapi.json", headers=ask)

    assert [response.headers.get("content-encoding") for response in (large, small, schema)] == ["gzip", None, "gzip"]
    assert len(large.json()["predictions"]) == 50


# --- the Open Inference Protocol


def call(*texts: str, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}], **more}


@pytest.mark.parametrize("name", ["tiny", "overtone"])
async def test_the_model_is_described(client: httpx.AsyncClient, tiny_bundle: Bundle, name: str) -> None:
    versioned = f"/v2/models/{name}/versions/{tiny_bundle.version}"
    body = (await client.get(f"/v2/models/{name}")).json()

    assert (body["name"], body["versions"]) == (name, [tiny_bundle.version])
    assert [item["name"] for item in body["outputs"]] == ["label", "confidence", "scores"]
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", f"/v2/models/{name}/ready", versioned):
        assert (await client.get(path)).status_code == 200
    assert (await client.post(f"{versioned}/infer", json=call("love"))).status_code == 200


async def test_tensors_in_json(client: httpx.AsyncClient, tiny_bundle: Bundle) -> None:
    body = (await client.post("/v2/models/tiny/infer", json=call("love", "hate", id="7"))).json()
    label, confidence, scores = body["outputs"]

    assert (body["id"], body["model_name"], body["model_version"]) == ("7", "tiny", tiny_bundle.version)
    assert label == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["positive", "negative"]}
    assert (confidence["shape"], scores["shape"], len(scores["data"])) == ([2], [2, 3], 6)
    nested = call("love")
    nested["inputs"][0] |= {"shape": [1, 1], "data": [["love"]]}
    one = await client.post("/v2/models/tiny/infer", json=nested | {"outputs": [{"name": "label"}]})
    assert [item["name"] for item in one.json()["outputs"]] == ["label"]


async def test_tensors_in_binary(client: httpx.AsyncClient) -> None:
    data = b"\x04\x00\x00\x00love\x04\x00\x00\x00hate"
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(data)}}
    head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    headers = {"inference-header-content-length": str(len(head))}
    response = await client.post("/v2/models/tiny/infer", content=head + data, headers=headers)
    length = int(response.headers["inference-header-content-length"])
    label, _, scores = orjson.loads(response.content[:length])["outputs"]
    blobs = response.content[length:]

    assert blobs[: label["parameters"]["binary_data_size"]] == b"\x08\x00\x00\x00positive\x08\x00\x00\x00negative"
    rows = np.frombuffer(blobs[-scores["parameters"]["binary_data_size"] :], "<f4").reshape(scores["shape"])
    assert rows.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("tiny", {}, 422), ("tiny", [], 422), ("other", call("love"), 404), ("tiny/versions/1", call("love"), 404),
        ("tiny", call("love", outputs=[{"name": "x"}]), 422),
        ("tiny", call(""), 422), ("tiny", call("love", id=7), 422),
        ("tiny", call("love", outputs=[{"name": "label"}] * 2), 422), ("tiny", call("love", parameters=[]), 422),
        ("tiny", call(LONG, parameters={"long_text": "reject"}), 422), ("tiny", {"inputs": [{"name": "text"}]}, 422),
    ],
)  # fmt: skip
async def test_errors_have_both_forms(client: httpx.AsyncClient, path: str, body: Any, status: int) -> None:
    response = await client.post(f"/v2/models/{path}/infer", json=body)

    assert response.status_code == status
    assert response.json()["error"] == response.json()["detail"]
    assert response.json()["code"] in {"invalid_input", "not_found"}


async def test_every_error_of_v2_has_its_member(client: httpx.AsyncClient) -> None:
    assert "error" in (await client.get("/v2/nowhere")).json()
    assert "error" in (await client.get("/v2", headers={"x-api-key": "wrong"})).json()
    assert "error" not in (await client.get("/nowhere")).json()
