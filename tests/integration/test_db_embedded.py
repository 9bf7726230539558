"""The embedded server: started, stopped, killed, taken over."""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from overtone.db.embedded import EmbeddedPostgres
from overtone.errors import EnvironmentProblemError

MakeServer = Callable[..., EmbeddedPostgres]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path."""
    made = Path(tempfile.mkdtemp(prefix=f"overtone-test-{os.getpid()}-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def make_server(folder: Path) -> Iterator[MakeServer]:
    """Servers on data folders below `folder`, not running yet and stopped afterwards."""
    made = []

    def make(data: str = "data", *, durable: bool = False) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(folder / data, folder / "s", durable=durable))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="module")
def initialised() -> Iterator[Path]:
    """A data folder made once, for the tests to copy."""
    made = Path(tempfile.mkdtemp(prefix=f"overtone-test-{os.getpid()}-", dir="/tmp"))
    server = EmbeddedPostgres(made / "data", made / "s", durable=False)
    server.start()
    server.stop()
    yield made / "data"
    shutil.rmtree(made)


@pytest.fixture
def server(folder: Path, initialised: Path, make_server: MakeServer) -> EmbeddedPostgres:
    """A server with a data folder that is not running yet."""
    subprocess.run(["cp", "-a", str(initialised), str(folder / "data")], check=True)
    return make_server()


def query(server: EmbeddedPostgres, statement: str) -> object:
    async def ask() -> object:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(ask())


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def await_true(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_first_start_makes_a_private_server(folder: Path, make_server: MakeServer) -> None:
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "api_key").touch(0o600)
    server = make_server("home/data", durable=True)
    assert not server.is_running()
    url = server.start()
    assert server.is_running()
    assert server.start() == url == server.url
    assert query(server, "SHOW server_encoding") == "UTF8"
    assert query(server, "SHOW listen_addresses") == ""
    assert query(server, "SHOW fsync") == "on"
    for private in (home / "data", folder / "s"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    # Root's server runs as another user, who may pass through the home and no more.
    assert server.pid
    assert psutil.Process(server.pid).uids().effective != 0
    assert stat.S_IMODE(home.stat().st_mode) == (0o701 if os.geteuid() == 0 else 0o700)
    assert stat.S_IMODE((home / "api_key").stat().st_mode) == 0o600
    server.stop()
    assert not server.is_running()
    assert server.pid is None
    server.stop()


def test_data_outlives_a_restart(server: EmbeddedPostgres) -> None:
    server.start()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    server.stop()
    server.start()
    assert query(server, "SELECT answer FROM kept") == 42


def test_a_killed_server_is_started_again(server: EmbeddedPostgres) -> None:
    server.start()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert not server.restart_if_dead()
    killed = server.pid
    assert killed
    os.kill(killed, signal.SIGKILL)
    await_true(server.restart_if_dead)
    assert server.pid != killed
    assert query(server, "SELECT answer FROM kept") == 42


def test_a_killed_server_with_a_busy_backend_is_started_again(server: EmbeddedPostgres) -> None:
    server.start()
    failed = threading.Event()

    def work() -> None:
        try:
            query(server, "SELECT count(*) FROM generate_series(1, 1000000000) a, generate_series(1, 100) b")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            failed.set()

    worker = threading.Thread(target=work)
    worker.start()
    await_true(lambda: query(server, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%series%'") == 2)
    assert server.pid
    os.kill(server.pid, signal.SIGKILL)
    started = time.monotonic()
    await_true(server.restart_if_dead)
    assert time.monotonic() - started < 20
    worker.join(10)
    assert failed.is_set()


def test_a_server_whose_owner_was_killed_is_taken_over(server: EmbeddedPostgres, folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from overtone.db.embedded import EmbeddedPostgres;"
        f"EmbeddedPostgres(Path({str(folder / 'data')!r}), Path({str(folder / 's')!r}), durable=False).start();"
        "time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    await_true(server.is_running)
    owner.kill()
    owner.wait()
    left = server.pid
    assert left
    assert server.is_running()
    server.start()
    assert server.pid != left
    await_true(lambda: is_gone(left))
    assert query(server, "SELECT 1") == 1


def test_a_server_of_somebody_else_is_stopped(server: EmbeddedPostgres, make_server: MakeServer) -> None:
    server.start()
    pid = server.pid
    make_server().stop()
    assert not server.is_running()
    assert pid
    await_true(server.restart_if_dead)


def test_a_stale_pid_that_another_process_has_now_is_no_obstacle(server: EmbeddedPostgres, folder: Path) -> None:
    server.start()
    lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
    assert server.pid
    os.kill(server.pid, signal.SIGKILL)
    await_true(lambda: not server.is_running())
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (folder / "data" / "postmaster.pid").write_text("\n".join([str(bystander.pid), *lines[1:], ""]))
        assert server.pid is None
        # A process that answers no more may still be on its way out.
        await_true(server.restart_if_dead)
        assert query(server, "SELECT 1") == 1
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_first_start_that_was_cut_short_is_made_good(folder: Path, make_server: MakeServer) -> None:
    (folder / "data.new").mkdir()
    (folder / "data.new" / "PG_VERSION").write_text("18\n")
    (folder / "data").mkdir()
    server = make_server()
    server.start()
    assert query(server, "SELECT current_database()") == "overtone"
    assert not (folder / "data.new").exists()


def test_a_server_that_cannot_start_says_why(server: EmbeddedPostgres, folder: Path) -> None:
    (folder / "data" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EnvironmentProblemError, match="no_such_setting"):
        server.start()
    assert not server.is_running()


def test_post_text_stays_out_of_the_server_log(server: EmbeddedPostgres) -> None:
    server.start()
    query(server, "CREATE TABLE posts (text text NOT NULL, length int CHECK (length > 0))")
    with pytest.raises(asyncpg.CheckViolationError):
        query(server, "INSERT INTO posts VALUES ('a private matter', -1)")
    log = server.log_file.read_text()
    assert "violates check constraint" in log
    assert "private matter" not in log
