"""Bodies that do not arrive: on a clock that is put forward while the server waits."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import orjson
import pytest
from starlette.requests import Request

from overtone.bundle import Bundle
from overtone.errors import TooSlowError
from serve import bodies, ndjson
from serve.auth import Gate, Identity, KeyRing
from serve.classifier import Classifier
from serve.http import create_app
from serve.service import Service

SECRET = "ovt_a-key"
NEVER = None
"""In place of a message: none comes any more."""


class OneKey:
    """The store of one key."""

    async def active(self) -> Mapping[bytes, Identity]:
        return {sha256(SECRET.encode()).digest(): Identity("key", frozenset({"predict"}))}

    async def find(self, digest: bytes) -> Identity | None:
        return None


class Client:
    """Sends the messages given; before each the clock of the event loop goes forward."""

    def __init__(self, messages: Sequence[tuple[float, Any]]) -> None:
        self._messages = list(messages)
        self._loop = asyncio.get_running_loop()
        self._real = self._loop.time
        self._skipped_s = 0.0
        self._loop.time = lambda: self._real() + self._skipped_s  # type: ignore[method-assign]
        self.timers = 0
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        after_s, message = self._messages.pop(0)
        self.timers = max(self.timers, sum(not timer.cancelled() for timer in self._loop._scheduled))  # type: ignore[attr-defined]
        if after_s:
            await asyncio.sleep(0)
            self._skipped_s += after_s
        if message is NEVER:
            await asyncio.Event().wait()
        return message

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def left(self) -> int:
        """How many messages were not asked for."""
        return len(self._messages)

    def request(self, **headers: str) -> Request:
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return Request({"type": "http", "headers": [(b"content-type", b"application/json"), *given]}, self.receive)


def part(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.fixture
async def service(tiny_bundle: Bundle) -> AsyncIterator[Service]:
    classifier = Classifier()
    await classifier.load(tiny_bundle.path)
    keys = KeyRing(OneKey())
    await keys.refresh()
    yield Service(classifier=classifier, gate=Gate(keys), records=None)  # type: ignore[arg-type]
    await classifier.close()


async def answer(service: Service, client: Client, path: str, media: bytes) -> tuple[dict[bytes, bytes], int, bytes]:
    """Headers, status and body of what `client` is answered."""
    headers = [(b"content-type", media), (b"x-api-key", SECRET.encode()), (b"content-length", b"40")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await asyncio.wait_for(create_app(service)(scope, client.receive, client.send), 1e9)
    start, *rest = client.sent
    return dict(start["headers"]), start["status"], b"".join(message["body"] for message in rest)


async def test_a_body_that_is_there_sets_no_timer() -> None:
    client = Client([(0, part(b'{"text": "love"}', more=False))])

    assert await bodies.read_json(client.request()) == {"text": "love"}
    assert client.timers == 0


@pytest.mark.parametrize("messages", [[(31, NEVER)], [(0, part(b'{"text"')), (29, part(b":")), (2, NEVER)]])
async def test_a_body_that_stops_is_given_up(messages: list[tuple[float, Any]]) -> None:
    with pytest.raises(TooSlowError, match="within 30 s"):
        await bodies.read_json(Client(messages).request(content_length="16"))


async def test_a_trickle_does_not_last_longer_than_silence() -> None:
    trickle = Client([(1.0, part(b" ")) for _ in range(100)])
    with pytest.raises(TooSlowError):
        await bodies.read_json(trickle.request(content_length="100"))
    assert trickle.left > 60


async def test_large_bodies_have_more_time() -> None:
    messages = [(0, part(b'{"text": ')), (45, part(b'"love"')), (0, part(b"}", more=False))]
    assert await bodies.read_json(Client(messages).request(content_length=str(20 * 2**20))) == {"text": "love"}

    unannounced = [(0, part(b"")), (bodies.BODY_TIMEOUT_S + 63, part(b"{}", more=False))]
    assert await bodies.read_json(Client(unannounced).request()) == {}


async def test_a_late_body_whose_reader_is_cancelled_is_let_go() -> None:
    task = asyncio.create_task(bodies.read_json(Client([(0, NEVER)]).request()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_late_body_is_408_and_ends_the_connection(service: Service) -> None:
    headers, status, body = await answer(service, Client([(31, NEVER)]), "/predict", b"application/json")

    assert (status, orjson.loads(body)["code"]) == (408, "too_slow")
    assert headers[b"connection"] == b"close"


async def test_lines_that_never_begin_are_408(service: Service) -> None:
    silent = Client([(ndjson.SILENT_S + 1, NEVER), (0, NEVER)])
    _, status, body = await answer(service, silent, "/predict/batch", b"application/x-ndjson")

    assert (status, orjson.loads(body)["code"]) == (408, "too_slow")


async def test_who_waits_for_an_answer_is_not_silent() -> None:
    has_asked_again = asyncio.Event()

    class Waiting(Client):
        async def receive(self) -> Any:
            if self.left == 2:
                has_asked_again.set()
            return await super().receive()

    async def spend(_: int) -> None:
        await has_asked_again.wait()

    async def classify(texts: list[str]) -> list[Any]:
        return texts

    client = Waiting([(0, part(b'"love"\n')), (ndjson.SILENT_S + 1, NEVER), (0, part(b"", more=False)), (0, NEVER)])
    request = client.request()
    streamed = ndjson.StreamedAnswers(request, ndjson.Stream(spend, classify, patience_s=600))
    await asyncio.wait_for(streamed(request.scope, client.receive, client.send), 1e9)

    assert b"".join(message.get("body", b"") for message in client.sent) == b'"love"\n'


async def test_lines_that_stop_end_the_stream_after_their_answers(service: Service) -> None:
    class Stopping(Client):
        async def receive(self) -> Any:
            while self.left == 2 and len(self.sent) < 3:  # noqa: ASYNC110  (state of the code under test)
                await asyncio.sleep(0)
            return await super().receive()

    stopping = Stopping([(0, part(b'"love"\n')), (59, part(b'"hate"\n')), (61, NEVER), (0, NEVER)])
    _, status, body = await answer(service, stopping, "/predict/batch", b"application/x-ndjson")
    *answers, last = [orjson.loads(line) for line in body.splitlines()]

    assert status == 200
    assert [line["label"] for line in answers] == ["positive", "negative"]
    assert (last["error"]["code"], last["ended"]) == ("too_slow", True)
