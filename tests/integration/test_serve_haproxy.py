"""HAProxy as Ray configures it and `serve.haproxy` changes it, before replicas that die."""

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from overtone.cli.draining import drain_api
from overtone.ports import free_ports
from serve.environment import find_haproxy, runtime_folder, serve_environment

Replica = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

BINARY = find_haproxy()
pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="no HAProxy is installed"),
    # What importing Ray Serve warns of is Ray's business.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
LARGE = b"x" * 200_000


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


def answering(body: bytes = b"{}", status: bytes = b"200 OK", media: bytes = b"application/json") -> Replica:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if b"/-/healthz" in await read_request(reader):
                writer.write(HEALTHY)
                continue
            head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (status, media, len(body))
            writer.write(head + body)

    return serve


def dying(after: bytes = b"") -> Replica:
    """Answers health checks; of a prediction it sends `after` and is gone."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"/predict" not in await read_request(reader):
            writer.write(HEALTHY)
        writer.write(after)
        await writer.drain()

    return serve


def write_config(file: Path, port: int, servers: list[int], environment: dict[str, str], *, has_app: bool) -> None:
    """What Ray writes for HAProxy on `port` before replicas on the ports `servers`."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(file.parent / "admin.sock"),
        server_state_base=str(file.parent),
        server_state_file=str(file.parent / "server-state"),
        metrics_enabled=False,
        nbthread=1,
        bufsize=int(environment["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        retry_on=environment["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=int(environment["RAY_SERVE_HAPROXY_RETRIES"]),
        observe_error_limit=int(environment["RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT"]),
        is_head=True,
        has_received_routes=True,
        has_received_servers=True,
    )
    replicas = [ServerConfig(f"r{number}", "127.0.0.1", port) for number, port in enumerate(servers)]
    fallback = ServerConfig("fallback", "127.0.0.1", 1)
    app = BackendConfig("app", "/", app_name="app", servers=replicas, fallback_server=fallback)
    backends = {"app": app} if has_app else {}
    HAProxyApi(config, backends, str(file))._generate_config_file_internal()


@asynccontextmanager
async def proxy(folder: Path, *replicas: Replica, started: list[asyncio.Server] | None = None) -> AsyncIterator[str]:
    """HAProxy before `replicas`, whose servers are put into `started`; its address."""
    environment = serve_environment(host="127.0.0.1", folder=folder)

    def closing(replica: Replica) -> Replica:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await replica(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        return serve

    servers = [await asyncio.start_server(closing(replica), "127.0.0.1", 0) for replica in replicas]
    if started is not None:
        started += servers
    try:
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        async with proxy_before(folder, ports, environment, has_app=bool(servers)) as url:
            yield url
    finally:
        for server in servers:
            server.close()


@asynccontextmanager
async def proxy_before(
    folder: Path, servers: list[int], environment: dict[str, str], *, has_app: bool = True
) -> AsyncIterator[str]:
    """HAProxy with Ray's configuration for replicas on the ports `servers`; its address."""
    (port,), file = free_ports(1), folder / "haproxy.cfg"
    write_config(file, port, servers, environment, has_app=has_app)
    process = await asyncio.create_subprocess_exec(
        environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file), stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(10):
            while not await accepts(port):
                assert process.returncode is None, await process.stderr.read()  # type: ignore[union-attr]
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was ended
            process.kill()
        _, said = await process.communicate()
    complaints = [line for line in said.decode().splitlines() if "parsing [" in line]
    assert complaints == []


async def accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        await asyncio.sleep(0.02)
        return False
    writer.close()
    return True


@pytest.fixture
def folder(tmp_path: Path) -> object:
    folder = runtime_folder(tmp_path)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def assert_is_unavailable(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "unavailable"


async def test_another_replica_is_asked_when_one_dies_with_a_small_request(folder: Path) -> None:
    async with proxy(folder, dying(), answering(b'{"label":"x"}')) as url, httpx.AsyncClient(base_url=url) as client:
        answers = [await client.post("/predict", content=b"x" * 1000) for _ in range(8)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b'{"label":"x"}')] * 8


async def test_the_death_of_the_only_replica_is_told(folder: Path) -> None:
    servers: list[asyncio.Server] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"mortal" not in await read_request(reader):
            writer.write(HEALTHY)
        servers[0].close()

    async with proxy(folder, serve, started=servers) as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(3):
            assert (await client.post("/predict", content=b"x")).status_code == 200
        for body in (b"mortal", b"x", LARGE):
            assert_is_unavailable(await client.post("/predict", content=body))


@pytest.mark.parametrize("how", ["in one piece", "in chunks"])
async def test_a_large_request_that_a_replica_dies_with_is_answered(folder: Path, how: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield LARGE

    async with proxy(folder, dying()) as url, httpx.AsyncClient(base_url=url) as client:
        await client.get("/-/routes")  # so that the next is not the connection's first request
        for _ in range(3):
            body = LARGE if how == "in one piece" else chunks()
            assert_is_unavailable(await client.post("/predict/batch", content=body))


async def test_an_answer_that_breaks_off_is_replaced(folder: Path) -> None:
    cut = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 144\r\n\r\n"
    for after in (cut, cut + b'{"label"'):
        async with proxy(folder, dying(after)) as url, httpx.AsyncClient(base_url=url) as client:
            await client.get("/-/routes")
            for body in (b"x", LARGE):
                assert_is_unavailable(await client.post("/predict", content=body))


async def test_predictions_that_are_alone_go_to_the_same_replica_and_the_rest_in_turn(folder: Path) -> None:
    async with proxy(folder, answering(b"0"), answering(b"1")) as url, httpx.AsyncClient(base_url=url) as client:
        alone = {(await client.post("/predict", content=b"x")).content for _ in range(20)}
        together = await asyncio.gather(*(client.post("/predict", content=b"x") for _ in range(40)))
        in_turn = [(await client.get("/models")).content for _ in range(6)]

    assert alone == {b"0"}
    assert sorted(in_turn) == [b"0"] * 3 + [b"1"] * 3
    assert {answer.content for answer in together} == {b"0", b"1"}


async def test_large_requests_and_answers_pass_whole(folder: Path) -> None:
    async with proxy(folder, answering(LARGE)) as url, httpx.AsyncClient(base_url=url) as client:
        for body in (LARGE, b"x", LARGE):
            answer = await client.post("/predict/batch", content=body)
            assert (answer.status_code, answer.content) == (200, LARGE)


async def test_an_answer_to_head_is_not_taken_for_a_broken_one(folder: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 144\r\n\r\n")

    async with proxy(folder, serve) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.head("/predict")

    assert (answer.status_code, answer.headers["content-length"]) == (200, "144")


async def test_errors_that_are_not_ours_become_problems(folder: Path) -> None:
    async with (
        proxy(folder, answering(b"Internal Server Error", b"500 Internal Server Error", b"text/plain")) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        assert_is_unavailable(await client.post("/predict", content=b"x"))


@dataclass
class Full:
    """A replica that refuses, by a header if its queue is full, and counts what it was asked."""

    header: bytes
    asked: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if b"/-/healthz" in await read_request(reader):
                writer.write(HEALTHY)
                continue
            self.asked += 1
            head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/problem+json\r\ncontent-length: 2\r\n"
            writer.write(head + self.header + b"\r\n{}")


async def test_single_texts_are_refused_before_replicas_whose_queue_is_full(folder: Path) -> None:
    replica = Full(b"overtone-queue: full\r\n")
    async with proxy(folder, replica) as url, httpx.AsyncClient(base_url=url) as client:
        answers = [await client.post("/predict?top_k=1", content=b"x") for _ in range(60)]
        asked = replica.asked
        assert 1 <= asked < 60
        others = [await client.post("/predict/batch", content=b"x") for _ in range(20)]
        assert replica.asked == asked + 20
        async with asyncio.timeout(10):
            while replica.asked == asked + 20:  # not for long
                answers.append(await client.post("/predict", content=b"x"))

    assert {answer.status_code for answer in (*answers, *others)} == {429}
    assert not any("overtone-queue" in answer.headers for answer in (*answers, *others))
    refused = [answer for answer in answers if answer.content != b"{}"]
    assert all(answer.json()["code"] == "overloaded" and answer.headers["retry-after"] == "1" for answer in refused)


async def test_single_texts_that_are_refused_for_another_reason_are_passed_on(folder: Path) -> None:
    replica = Full(b"")
    async with proxy(folder, replica) as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(20):
            await client.post("/predict", content=b"x")
    assert replica.asked == 20


async def test_errors_that_are_ours_stay(folder: Path) -> None:
    ours = answering(b"{}", b"500 Internal Server Error", b"application/problem+json")
    async with proxy(folder, ours) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/predict", content=b"x")).status_code == 500


async def test_replicas_that_serve_takes_off_its_list_go_on_while_they_are_healthy(folder: Path) -> None:
    environment = serve_environment(host="127.0.0.1", folder=folder)
    replica = await asyncio.start_server(answering(b'{"label":"x"}'), "127.0.0.1", 0)
    listed = [replica.sockets[0].getsockname()[1]]

    for servers in (listed, []):  # as when the only replica is given a new `user_config`
        async with proxy_before(folder, servers, environment) as url, httpx.AsyncClient(base_url=url) as client:
            for body in (b"x", LARGE):
                assert (await client.post("/predict", content=body)).content == b'{"label":"x"}'
    replica.close()
    async with proxy_before(folder, [], environment) as url, httpx.AsyncClient(base_url=url) as client:
        assert_is_unavailable(await client.post("/predict", content=b"x"))


async def test_a_replica_that_is_ending_is_asked_while_there_is_no_other(folder: Path) -> None:
    """Serve has told it to end, which its health tells, and HAProxy does not know the next one yet."""
    unhealthy = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
    checked = asyncio.Event()
    count = 0

    async def ending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while True:
            if b"/-/healthz" in await read_request(reader):
                count += 1
                writer.write(unhealthy)
                if count > 5:
                    checked.set()
                continue
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")

    async with proxy(folder, ending) as url, httpx.AsyncClient(base_url=url) as client:
        async with asyncio.timeout(30):
            await checked.wait()
        for body in (b"x", LARGE):
            assert (await client.post("/predict", content=body)).content == b"{}"


async def test_haproxy_is_ready_while_a_replica_takes_connections(folder: Path) -> None:
    servers: list[asyncio.Server] = []

    async def becomes(client: httpx.AsyncClient, status: int) -> None:
        async with asyncio.timeout(30):
            while (await client.get("/-/healthz")).status_code != status:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async with proxy(folder, answering(), started=servers) as url, httpx.AsyncClient(base_url=url) as client:
        await becomes(client, 200)
        servers[0].close()
        await becomes(client, 503)


async def test_without_an_application_it_is_unavailable(folder: Path) -> None:
    async with proxy(folder) as url, httpx.AsyncClient(base_url=url) as client:
        assert_is_unavailable(await client.post("/predict", content=b"x"))


@pytest.mark.parametrize("is_in_time", [True, False])
async def test_a_soft_end_waits_for_requests_under_way_and_for_nothing_else(folder: Path, is_in_time: bool) -> None:
    held, may_go = asyncio.Semaphore(0), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read_request(reader)
            if b"/slow" in request:
                held.release()
                await may_go.wait()
            writer.write(HEALTHY)

    async def ask(body: bytes) -> int:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return (await client.post("/slow", content=body)).status_code

    async with proxy(folder, serve) as url, httpx.AsyncClient(base_url=url) as idle:
        await idle.get("/models")
        asking = [asyncio.create_task(ask(body)) for body in (b"x", LARGE)]
        for _ in asking:
            await held.acquire()
        draining = asyncio.create_task(asyncio.to_thread(drain_api, folder, 60 if is_in_time else 0.1))
        while await accepts(int(url.rpartition(":")[2])):
            pass
        if is_in_time:
            assert not draining.done()
            may_go.set()
        assert await draining is is_in_time
        may_go.set()
        assert await asyncio.gather(*asking) == [200, 200]


def test_without_haproxy_there_is_nothing_to_wait_for(folder: Path) -> None:
    folder.mkdir()
    assert drain_api(folder, 60)
