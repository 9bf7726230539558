"""What others can do to the stack: nothing of it is reachable from another machine, and no body does harm."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import psutil
import pytest

from hostile import Call, hostile_calls
from live_stack import LARGE, LIKED, SECRET, Stack, asking, failures, until
from serve.environment import haproxy_pids

ROUNDS = 12
"""Of all hostile calls, at most. A replica keeps the memory that its first large body took, once, and that body may
come to it in any of the first rounds."""
GROWTH_BYTES = 16 * 2**20
"""By which two rounds in a row may raise the memory of HAProxy and all replicas together. They make 1,500 calls, so a
leak of eleven kilobytes a call shows in every pair of rounds."""


@pytest.fixture(scope="module", autouse=True)
def _two_replicas(stack: Stack) -> None:
    stack.deploy(replicas=2)
    stack.await_replicas(2)


def listeners(stack: Stack) -> Iterator[tuple[str, str, int]]:
    """Process, address and port of whatever of the stack listens for TCP or UDP."""
    for process in stack.processes():
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield process.name(), connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port


def test_nothing_listens_beyond_loopback(stack: Stack) -> None:
    assert [it for it in listeners(stack) if it[1] not in {"127.0.0.1", "::1"}] == []
    sockets = [path for path in stack.folder.rglob("*") if path.is_socket()]
    assert {"admin.sock", "stats.sock", "metrics.sock"} <= {path.name for path in sockets}
    assert all(path.stat().st_mode & 0o077 == 0 for path in sockets)


def test_no_port_can_be_reached_by_an_address_of_the_network(stack: Stack) -> None:
    found = [
        it.address for addresses in psutil.net_if_addrs().values() for it in addresses if it.family == socket.AF_INET
    ]
    ours = [address for address in found if not address.startswith("127.")]
    if not ours:
        pytest.skip("this machine has no address but loopback")
    ports = {port for _, _, port in listeners(stack)}
    assert {stack.port, *stack.listening()} <= ports

    reached = []
    for address in ours:
        for port in ports:
            with socket.socket() as client:
                client.settimeout(5)
                if client.connect_ex((address, port)) == 0:
                    reached.append((address, port))
    assert reached == []


def test_haproxy_listens_with_the_api_alone(stack: Stack) -> None:
    proxies = [psutil.Process(pid) for pid in haproxy_pids(stack.folder)]
    ports = {
        it.laddr.port for each in proxies for it in each.net_connections("inet") if it.status == psutil.CONN_LISTEN
    }

    assert ports == {stack.port}
    for path in ("/stats", "/haproxy?stats", "/metrics;csv", "/;csv"):
        answer = httpx.get(f"{stack.url}{path}")
        assert answer.status_code in {401, 404}, path
        assert answer.headers["content-type"] == "application/problem+json"


def test_refusals_reach_callers_at_once_and_say_when_to_come_back(stack: Stack) -> None:
    hurried = {"X-Request-Timeout-S": "0.01"}  # less than what waits needs, by the rate that the replica measures
    answers: list[httpx.Response] = []

    def is_refused() -> bool:
        with stack.client() as client:
            answers.append(client.post("/predict/batch", json={"texts": [LIKED] * 20}, headers=hurried))
        return answers[-1].status_code == 429

    with asking(stack, 8, "/predict/batch", LARGE) as large:
        until(lambda: len(large) >= 8)
        until(is_refused)

    assert failures(large) == []
    assert {answer.status_code for answer in answers} <= {200, 429, 504}
    refused = answers[-1]
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.timeout(600)
def test_no_body_does_harm_however_often_it_comes(stack: Stack) -> None:
    until(lambda: len(haproxy_pids(stack.folder)) == 1, 120)  # one that was reloaded may still have had a connection
    calls = hostile_calls()
    processes = [*stack.replicas(), *(psutil.Process(pid) for pid in haproxy_pids(stack.folder))]
    before = {process.pid for process in processes}

    def resident() -> int:
        return sum(process.memory_info().rss for process in processes)

    used: list[int] = []
    while len(used) < 3 or used[-1] > used[-3] + GROWTH_BYTES:
        assert len(used) < ROUNDS, [f"{each / 2**20:.0f} MiB" for each in used]
        assert asyncio.run(play(stack, calls)) == []
        used.append(resident())

    assert {process.pid for process in stack.replicas()} <= before
    with stack.client() as client:
        assert client.post("/predict", json={"text": LIKED}).status_code == 200


async def play(stack: Stack, calls: list[Call]) -> list[str]:
    """Make all `calls`, four at a time; what was not answered as the fault of its caller, or well."""
    waiting = iter(calls)
    bad: list[str] = []

    async def make(client: httpx.AsyncClient) -> None:
        for path, headers, body in waiting:
            answer = await client.post(path, content=body, headers=headers)
            if not 200 <= answer.status_code < 500:
                bad.append(f"{answer.status_code} {path} {headers} {body[:80]!r}")

    async with httpx.AsyncClient(base_url=stack.url, headers={"X-API-Key": SECRET}, timeout=60) as client:
        await asyncio.gather(*(make(client) for _ in range(4)))
    return bad
