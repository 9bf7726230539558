"""Connections to a server on the network are broken by the system when nothing comes through any more."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlsplit

import pytest

from overtone.db import Database
from overtone.errors import DatabaseUnavailableError


@contextlib.asynccontextmanager
async def over_tcp(url: str) -> AsyncIterator[str]:
    """The address of the server at `url`, which listens on a unix socket alone, by way of TCP."""
    split = urlsplit(url)
    path = f"{parse_qs(split.query)['host'][0]}/.s.PGSQL.5432"

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(path)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"postgresql://{split.username}@127.0.0.1:{server.sockets[0].getsockname()[1]}{split.path}"
    server.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no limit of this kind")
async def test_unacknowledged_bytes_break_a_connection(fresh_postgres_url: str) -> None:
    async with over_tcp(fresh_postgres_url) as url:
        db = await Database.open(url, max_size=1)
        async with db.acquire() as connection:
            found = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        await db.close()


_PROXY = """
import asyncio, sys
async def carry(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def serve(reader, writer):
    there, back = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(carry(reader, back), carry(there, writer), return_exceptions=True)
async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 5432)
    print("up", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class OtherHost:
    """A network namespace, joined to this one by a cable, with a way to the server at `path` in it."""

    def __init__(self, path: str) -> None:
        number = os.getpid() % 60_000
        self._name, self._here, self._there = f"ovt{number}", f"ovt{number}a", f"ovt{number}b"
        self._net = f"10.231.{number // 64 % 256}.{number % 64 * 4}"
        self.address, self._path = self._ip(2), path

    def _ip(self, host: int) -> str:
        start, _, last = self._net.rpartition(".")
        return f"{start}.{int(last) + host}"

    def __enter__(self) -> "OtherHost":
        for words in (
            f"netns add {self._name}",
            f"link add {self._here} type veth peer name {self._there}",
            f"link set {self._there} netns {self._name}",
            f"addr add {self._ip(1)}/30 dev {self._here}",
            f"link set {self._here} up",
            f"-n {self._name} addr add {self._ip(2)}/30 dev {self._there}",
            f"-n {self._name} link set {self._there} up",
        ):
            if _run(words):
                self.__exit__()
                pytest.skip("no network namespace can be made here")
        command = ["ip", "netns", "exec", self._name, sys.executable, "-c", _PROXY, self._path]
        self._proxy = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._proxy.stdout is not None
        assert self._proxy.stdout.readline() == b"up\n"
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_proxy"):
            self._proxy.kill()
            self._proxy.communicate()
        _run(f"link del {self._here}")
        _run(f"netns del {self._name}")

    def swallow(self, *, is_on: bool) -> None:
        """Let no packet come back, without a word to anybody; or let them again."""
        assert _run(f"-n {self._name} route {'add' if is_on else 'del'} blackhole {self._ip(1)}/32") == 0


def _run(words: str) -> int:
    return subprocess.run(["ip", *words.split()], stderr=subprocess.DEVNULL, check=False).returncode


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ip") or os.getuid() != 0, reason="needs root and ip")
async def test_a_network_that_swallows_everything_costs_half_a_minute(fresh_postgres_url: str) -> None:
    """The query that is under way ends as unavailable, though nobody ever says that the server is gone."""
    split = urlsplit(fresh_postgres_url)
    path = f"{parse_qs(split.query)['host'][0]}/.s.PGSQL.5432"
    with OtherHost(path) as host:
        db = await Database.open(f"postgresql://{split.username}@{host.address}:5432{split.path}", max_size=1)
        await db.ping()
        host.swallow(is_on=True)
        began = asyncio.get_running_loop().time()
        with pytest.raises(DatabaseUnavailableError):
            async with db.transaction() as connection:
                await connection.execute("SELECT 1")
        assert asyncio.get_running_loop().time() - began < 40
        host.swallow(is_on=False)
        async with asyncio.timeout(60):
            await until_back(db)
        await db.close()


async def until_back(db: Database) -> None:
    while True:
        with contextlib.suppress(DatabaseUnavailableError):
            return await db.ping()
        await asyncio.sleep(0.2)
