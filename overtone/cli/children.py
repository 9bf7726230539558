"""Processes of the stack that a command starts, each with its log file."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import psutil

from overtone.cli.exits import error_of
from overtone.cli.plan import Plan
from overtone.cli.processes import end
from overtone.cli.state import ProcessRecord
from overtone.errors import EnvironmentProblemError, UnavailableError
from overtone.ports import LOOPBACK

_LOG_LIMIT_BYTES = 10_000_000
_OBJECT_STORE_BYTES = 128 * 1024 * 1024

Tick = Callable[[], None]
"""Called while something is waited for; raises to stop the waiting."""


class Child:
    """A process in a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone."""

    def __init__(
        self, name: str, command: list[str], *, logs: Path, environment: Mapping[str, str], pipes: bool = False
    ) -> None:
        self.name = name
        self.log_file = logs / f"{name}.log"
        _rotate(self.log_file)
        with self.log_file.open("ab") as log:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.record = ProcessRecord.of(self._popen.pid)

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for the number of the signal that ended it."""
        return self._popen.poll()

    def stop(self, patience_s: float) -> None:
        """SIGTERM, and SIGKILL after `patience_s`."""
        with suppress(psutil.NoSuchProcess):
            if self._popen.poll() is None:
                end([psutil.Process(self._popen.pid)], patience_s=patience_s)
        self._popen.wait()

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        with suppress(OSError):
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            return "\n".join([f" The end of {self.log_file}:", *lines])
        return ""

    def require_alive(self) -> None:
        """Raise `EnvironmentProblemError` with its last words if it has ended."""
        if self.exit_status is not None:
            raise EnvironmentProblemError(
                f"{self.name} ended while starting (status {self.exit_status}).{self.last_words()}"
            )


class Driver(Child):
    """The process that talks to Ray; see `overtone.cli.driver`."""

    def __init__(
        self, address: str, metrics: Path, *ingest_files: Path, logs: Path, environment: Mapping[str, str]
    ) -> None:
        command = [sys.executable, "-m", "overtone.cli.driver", address, *map(str, (metrics, *ingest_files))]
        super().__init__("driver", command, logs=logs, environment=environment, pipes=True)
        self._answers: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def order(self, word: str) -> None:
        """Have `word` done."""
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.write(f"{word}\n".encode())
            self._popen.stdin.flush()

    def await_answer(self, word: str, timeout_s: float, tick: Tick = lambda: None) -> dict[str, Any]:
        """Wait until `word` is done; return the whole answer.

        Raises:
            OvertoneError: it failed, for the reason the class says.
            UnavailableError: it took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            tick()
            try:
                answer = self._answers.get(timeout=0.1)
            except Empty:
                self.require_alive()
                continue
            if answer.get("done") == word:
                return answer
            raise error_of(str(answer.get("code")))(f"{answer.get('message')}{self._see_log()}")
        raise UnavailableError(f"{word}: not done after {timeout_s:.0f} s.{self._see_log()}")

    def close(self) -> None:
        """End it: it has nothing left to do."""
        if self._popen.stdin:
            with suppress(OSError):
                self._popen.stdin.close()
        self.stop(0.0)

    def _see_log(self) -> str:
        return f" (More in {self.log_file}.)"

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with suppress(ValueError):
                self._answers.put(json.loads(line))


def ray_driver(plan: Plan) -> Driver:
    """Start the process that talks to Ray."""
    address = f"{LOOPBACK}:{plan.ports.gcs}"
    environment = plan.environment_of("driver")
    return Driver(address, plan.metrics, *plan.ingest_files, logs=plan.logs, environment=environment)


def ray_head(plan: Plan, cpus: int) -> Child:
    """Start Ray's head node on loopback; the process lives as long as all of Ray's own processes do."""
    options = {
        "node-ip-address": LOOPBACK,
        "port": plan.ports.gcs,
        "ray-client-server-port": plan.ports.client,
        "dashboard-host": LOOPBACK,
        "dashboard-port": plan.ports.dashboard,
        "dashboard-agent-listen-port": plan.ports.agent,
        "temp-dir": plan.ray_folder,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "num-cpus": cpus,
        "include-dashboard": str(plan.has_dashboard).lower(),
        "include-log-monitor": "false",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--disable-usage-stats", "--no-monitor", *(f"--{name}={value}" for name, value in options.items())]
    return Child("ray", command, logs=plan.logs, environment=plan.environment_of("ray"))


def simulator(plan: Plan) -> Child:
    """Start the simulator of the X API."""
    rate = plan.environment["SIMULATOR_RATE"]
    command = [sys.executable, "-m", "ingest.simulator", "--port", str(plan.ports.simulator), "--rate", rate]
    command += ["--log-format", "json"]
    return Child("simulator", command, logs=plan.logs, environment=plan.environment_of("simulator"))


def _rotate(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".log.1"))
