"""The processes of a day: PostgreSQL, simulator, API and ingestion, each of which is started again when it dies."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import yaml

from benchmarks.day.script import Day, Victim, kills, options, scenario
from benchmarks.day.verdict import Verdict, judge
from overtone.db.database import Database
from overtone.db.embedded import EmbeddedPostgres
from overtone.db.keys import create_key
from overtone.db.migrate import upgrade
from overtone.errors import OvertoneError
from overtone.ports import free_ports
from overtone.settings import environment_for, load_settings

_RESTART_AFTER_S = 1.0
_LOOK_EVERY_S = 2.0


@dataclass(slots=True)
class World:
    """Everything, in `folder`."""

    folder: Path
    day: Day
    ingest_processes: int = 1
    """Leader and standbys."""
    killed: list[str] = field(default_factory=list)
    _server: EmbeddedPostgres = field(init=False)
    _commands: dict[str, list[str]] = field(default_factory=dict)
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _environment: dict[str, str] = field(default_factory=dict)
    _log: IO[bytes] = field(init=False)
    _died_at: dict[str, float] = field(default_factory=dict)
    simulator_url: str = ""

    async def __aenter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "processes.log").open("ab")
        self._server = EmbeddedPostgres(self.folder / "data", self.folder / "s")
        url = await asyncio.to_thread(self._server.start)
        await upgrade(url)
        (self.folder / "day.yaml").write_text(yaml.safe_dump(scenario(self.day)))
        (self.folder / "ingest.yaml").write_text(yaml.safe_dump(options(self.day)))
        simulator, api = free_ports(2)
        self.simulator_url = f"http://127.0.0.1:{simulator}"
        settings = load_settings(overtone_home=self.folder / "home", api_port=api, api_host="127.0.0.1")
        self._environment = environment_for(
            settings,
            DATABASE_URL=url,
            X_API_BASE_URL=self.simulator_url,
            TWITTER_BEARER_TOKEN="t",
            OVERTONE_API_KEY=await _key_of(url),
            LOG_LEVEL="WARNING",
        )
        python = sys.executable
        day = str(self.folder / "day.yaml")
        self._commands = {
            "simulator": [python, "-m", "ingest.simulator", "--port", str(simulator), "--scenario", day],
            "api": [python, "-m", "benchmarks.day.api", str(api), str(self.day.real_share)],
        }
        for number in range(self.ingest_processes):
            self._commands[f"ingest-{number}"] = [python, "-m", "ingest", "--config", str(self.folder / "ingest.yaml")]
        for name in self._commands:
            self._start(name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 15)
            process.kill()
            process.wait()
        await asyncio.to_thread(self._server.stop)
        self._log.close()

    async def live_through(self, *, patience_s: float) -> Verdict:
        """The day with its kills; then wait at most `patience_s` for order, and give the account."""
        began = time.monotonic()
        due, outage_at = kills(self.day), self.day.outage_at_s
        while time.monotonic() - began < self.day.seconds or due:
            await asyncio.sleep(0.1)
            self._mend()
            if outage_at is not None and time.monotonic() - began >= outage_at:
                outage_at = None
                await self._without_postgres(self.day.outage_s)
            while due and time.monotonic() - began >= due[0][0]:
                await self._kill(due.pop(0)[1])
        deadline = time.monotonic() + patience_s
        while True:
            self._mend()
            verdict = await self._look()
            is_over = verdict is not None and verdict.published >= self.day.posts
            if verdict is not None and (time.monotonic() > deadline or (is_over and verdict.is_whole)):
                return verdict
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self) -> Verdict | None:
        try:
            db = await Database.open(self._environment["DATABASE_URL"], max_size=1)
        except OvertoneError:
            return None
        try:
            return await judge(db, self.simulator_url)
        except (OvertoneError, OSError):
            return None
        finally:
            await db.close()

    async def _kill(self, victim: Victim) -> None:
        self.killed.append(victim)
        if victim == "postgres":
            await self._without_postgres(_RESTART_AFTER_S)
            return
        names = [name for name in self._running if name.startswith(victim)]
        self._running[names[len(self.killed) % len(names)]].kill()

    async def _without_postgres(self, seconds: float) -> None:
        """Kill it, and start it again after a while in which everything else lives on."""
        if self._server.pid is not None:
            os.kill(self._server.pid, signal.SIGKILL)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(min(max(until - time.monotonic(), 0.0), 0.5))
            self._mend()
        await asyncio.to_thread(self._server.start)

    def _mend(self) -> None:
        """Start again what died a while ago."""
        now = time.monotonic()
        for name, process in list(self._running.items()):
            if process.poll() is not None and now - self._died_at.setdefault(name, now) >= _RESTART_AFTER_S:
                self._start(name)

    def _start(self, name: str) -> None:
        self._died_at.pop(name, None)
        self._running[name] = subprocess.Popen(
            self._commands[name], env=self._environment, stdout=self._log, stderr=self._log
        )


async def _key_of(url: str) -> str:
    db = await Database.open(url, max_size=1)
    try:
        _, secret = await create_key(db, "the day's ingestion", ["predict"])
        return secret
    finally:
        await db.close()
