"""What a running stack leaves on disk so that another process can find it: one lock and one state file a home.

Whoever starts or stops things in a home holds its lock, which the system frees when the holder dies, however it
dies. The state file names every process that was started together with its time of birth, because a bare process id
may belong to someone else by the time it is read.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil

from overtone.errors import EnvironmentProblemError

_FORMAT = 1
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that is told apart from a later one with the same id by its time of birth."""

    pid: int
    created: float
    """Seconds since the epoch, as psutil gives it."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """The record of a process that lives now.

        Raises:
            psutil.NoSuchProcess: it does not.
        """
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> psutil.Process | None:
        """The process, if it still lives and is the one that was recorded."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One part of the stack."""

    name: str
    address: str
    """Where it answers, or where it lives: for people."""
    process: ProcessRecord | None = None
    """None for parts that are not processes of their own."""
    seconds: float = 0.0
    """How long it took to start."""


@dataclass(frozen=True, slots=True)
class RunState:
    """One run of the stack."""

    run_id: str
    supervisor: ProcessRecord
    started_at: float
    """Seconds since the epoch."""
    phase: str = "starting"
    """starting, ready or stopping."""
    parts: tuple[PartRecord, ...] = ()
    addresses: dict[str, str] = field(default_factory=dict)
    source: str = ""
    """Where posts come from: `simulator`, the address of the X API, or `none`."""

    def with_part(self, part: PartRecord) -> "RunState":
        """This state with `part` in place of the one of the same name, or added."""
        others = tuple(known for known in self.parts if known.name != part.name)
        return replace(self, parts=(*others, part))


class RunFolder:
    """`run/` in the home: the lock, the state file, the multi-process metrics."""

    def __init__(self, home: Path) -> None:
        self.path = home / "run"
        self.metrics = self.path / "metrics"
        self._state = self.path / "state.json"
        self._lock_file = self.path / "lock"
        self._lock: int | None = None

    def make(self) -> None:
        """Make the folder, readable by its owner alone.

        Raises:
            EnvironmentProblemError: it cannot be made or written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise EnvironmentProblemError(
                f"{self.path} cannot be made: {error.strerror}. Set OVERTONE_HOME to a folder you can write to."
            ) from error
        if not os.access(self.path, os.W_OK):
            raise EnvironmentProblemError(f"{self.path} cannot be written. Set OVERTONE_HOME to a folder you own.")

    def try_lock(self) -> bool:
        """Take the lock if nobody holds it; held until `unlock` or the end of this process."""
        self.make()
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def lock(self, timeout_s: float, *, give_up: Callable[[], bool] = lambda: False) -> bool:
        """`try_lock` until it succeeds, `timeout_s` have passed or `give_up` says so."""
        deadline = time.monotonic() + timeout_s
        while not self.try_lock():
            if give_up() or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def unlock(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, state: RunState) -> None:
        """Write `state`, whole or not at all."""
        staging = self._state.with_suffix(".new")
        staging.write_text(json.dumps({"format": _FORMAT, **asdict(state)}, indent=1), encoding="utf-8")
        staging.replace(self._state)

    def load(self) -> RunState | None:
        """The state as last saved; None when there is none or it cannot be read as one."""
        try:
            raw = json.loads(self._state.read_text(encoding="utf-8"))
            return _parse(raw) if raw.pop("format") == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def forget(self) -> None:
        """Remove the state file."""
        self._state.unlink(missing_ok=True)


def _parse(raw: dict[str, Any]) -> RunState:
    parts = tuple(PartRecord(**{**part, "process": _process(part["process"])}) for part in raw.pop("parts"))
    return RunState(**{**raw, "supervisor": ProcessRecord(**raw["supervisor"]), "parts": parts})


def _process(raw: dict[str, Any] | None) -> ProcessRecord | None:
    return ProcessRecord(**raw) if raw else None
