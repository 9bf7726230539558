"""Which requests take the short way, and how their answers leave."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serve.shortcut import Shortcut, middlewares


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(Shortcut, "_target", None)
    return []


def way(name: str, taken: list[str]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        taken.append(name)

    return app


async def go(app: Any, method: str = "POST", path: str = "/predict", kind: str = "http") -> None:
    await app({"type": kind, "method": method, "path": path}, None, None)


async def test_without_an_application_all_goes_the_usual_way(taken: list[str]) -> None:
    await go(Shortcut(way("usual", taken)))

    assert taken == ["usual"]


@pytest.mark.parametrize(
    ("method", "path", "kind", "expected"),
    [
        ("POST", "/predict", "http", "short"),
        ("POST", "/predict/batch", "http", "short"),
        ("GET", "/predict", "http", "usual"),
        ("GET", "/-/healthz", "http", "usual"),
        ("POST", "/predict", "websocket", "usual"),
    ],
)
async def test_only_predictions_take_the_short_way(
    taken: list[str], method: str, path: str, kind: str, expected: str
) -> None:
    Shortcut.open(way("short", taken))
    await go(Shortcut(way("usual", taken)), method, path, kind)

    assert taken == [expected]


def test_an_application_of_another_loop_is_not_entered(taken: list[str]) -> None:

    async def open_elsewhere() -> None:
        Shortcut.open(way("short", taken))

    asyncio.run(open_elsewhere())
    asyncio.run(go(Shortcut(way("usual", taken))))

    assert taken == ["usual"]


def test_serve_is_given_the_shortcut() -> None:
    assert [item.cls for item in middlewares()] == [Shortcut]


class Connection(asyncio.Transport):
    """What a server writes to it, write by write; None for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes | None] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.written.append(None)

    def is_closing(self) -> bool:
        return None in self.written

    def is_reading(self) -> bool:
        return True


async def written(response: Response, *headers: str) -> Sequence[bytes | None]:
    """What uvicorn, as Serve starts it, writes when the application of the short way answers with `response`."""
    connection, answered = Connection(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)
        answered.set()

    Shortcut.open(app)
    config = Config(Shortcut(way("usual", [])), lifespan="off", log_config=None, access_log=False)
    config.load()
    protocol = HttpToolsProtocol(config, ServerState(), {})
    protocol.connection_made(connection)
    head = ["POST /predict HTTP/1.1", "host: here", "content-length: 0", *headers]
    protocol.data_received("".join(f"{line}\r\n" for line in [*head, ""]).encode())
    async with asyncio.timeout(5):
        await answered.wait()
    if protocol.timeout_keep_alive_task is not None:
        protocol.timeout_keep_alive_task.cancel()
    return connection.written


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("body", [b"", b'{"label":"positive"}'])
async def test_a_whole_answer_is_written_at_once(body: bytes) -> None:
    (whole,) = await written(Response(body))

    assert whole is not None
    assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
    assert whole.endswith(b"\r\n\r\n" + body)


@pytest.mark.usefixtures("taken")
async def test_the_connection_is_closed_behind_the_answer() -> None:
    whole, end = await written(Response(b"{}"), "connection: close")

    assert whole is not None
    assert whole.endswith(b"\r\n\r\n{}")
    assert end is None


@pytest.mark.usefixtures("taken")
async def test_an_answer_in_parts_is_written_as_they_come() -> None:
    head, *parts = await written(StreamingResponse(iter([b"one", b"two"])))

    assert head is not None
    assert head.endswith(b"\r\n\r\n")
    assert parts == [b"3\r\none\r\n", b"3\r\ntwo\r\n", b"0\r\n\r\n"]
