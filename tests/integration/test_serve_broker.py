"""The queue of tasks with real workers of Celery, in Redis and in files, and Celery's own command against them."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overtone.errors import UnavailableError
from overtone.settings import Settings, load_settings
from serve.broker import FAILED_QUEUE, QUEUE, QUEUES, Broker, broker_url

_WORKER = """
import sys
from overtone.settings import load_settings
from serve.broker import QUEUE, make_app
app = make_app(load_settings())

@app.task(name="score_chunk")
def score(job_id, number):
    print(job_id, number, flush=True)

app.worker_main(["worker", "-Q", QUEUE, "--pool=threads", "--concurrency=1", "--loglevel=ERROR",
                 "--without-gossip", "--without-mingle", "--without-heartbeat", "--hostname=test-worker"])
"""


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.05)


class Redis:
    """A server that keeps its tasks over a kill."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.port = probe.getsockname()[1]
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        # Its default, a write that waits for the fsync of each second, can lose the newest task to a kill.
        self._command = [program, *options, "--appendonly", "yes", "--appendfsync", "always"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64) == b"+PONG\r\n"
        return False


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["redis", "files"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = f"redis://127.0.0.1:{request.getfixturevalue('redis').port}/0" if request.param == "redis" else None
    return load_settings(overtone_home=tmp_path / "home", redis_url=url)


def environment(settings: Settings) -> dict[str, str]:
    url = settings.redis_url.get_secret_value() if settings.redis_url else ""
    return {**os.environ, "OVERTONE_HOME": str(settings.home), "REDIS_URL": url, "PYTHONPATH": os.getcwd()}


def test_tasks_are_counted_taken_and_seen_by_celery(settings: Settings, tmp_path: Path) -> None:
    broker = Broker(settings)
    for number in range(3):
        broker.send("score_chunk", ["job", number])
    assert broker.lengths() == dict.fromkeys(QUEUES, 0) | {QUEUE: 3}
    log = (tmp_path / "worker.log").open("w+")
    worker = subprocess.Popen([sys.executable, "-c", _WORKER], env=environment(settings), stdout=log, stderr=log)
    try:
        until(lambda: (tmp_path / "worker.log").read_text().count("job ") == 3)
        until(lambda: broker.lengths()[QUEUE] == 0)
        command = [sys.executable, "-m", "celery", "-A", "serve.broker", "inspect", "ping", "--json", "-t", "10"]
        said = subprocess.run(
            command, env=environment(settings), capture_output=True, text=True, check=False, timeout=120
        )
        assert json.loads(said.stdout) == {"celery@test-worker": {"ok": "pong"}}, said.stderr
    finally:
        worker.kill()
        worker.wait()
        log.close()
        broker.close()


def test_a_redis_that_is_killed_is_told_of_and_found_again(redis: Redis, tmp_path: Path) -> None:
    broker = Broker(load_settings(overtone_home=tmp_path, redis_url=f"redis://127.0.0.1:{redis.port}/0"))
    broker.send("score_chunk", ["job", 1])
    redis.kill()
    with pytest.raises(UnavailableError, match="The broker does not answer"):
        broker.send("score_chunk", ["job", 2])
    with pytest.raises(UnavailableError):
        broker.lengths()
    redis.start()
    assert broker.lengths()[QUEUE] == 1
    broker.send("score_chunk", ["job", 2])
    assert (broker.lengths()[QUEUE], broker.lengths()[FAILED_QUEUE]) == (2, 0)
    broker.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, "overtone-files://"),
        ("redis://:secret@host:6379/2", "redis://:secret@host:6379/2"),
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock"),
        ("rediss://host", "rediss://host"),
    ],
)
def test_the_address_is_written_as_celery_takes_it(url: str | None, expected: str, tmp_path: Path) -> None:
    assert broker_url(load_settings(overtone_home=tmp_path, redis_url=url)) == expected
