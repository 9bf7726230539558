"""Finding and ending the processes of one home, and never any other.

A process is ours when its environment carries the mark of the home, or when it descends from one that does. The
mark is set on everything the supervisor starts and is inherited from there; PostgreSQL, which is started with an
empty environment, is known by its data folder (`overtone.db.embedded`).
"""

import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

import psutil

MARK = "OVERTONE_RUN"
"""The variable that marks our processes: `<home mark>:<run id>:<part>`."""

_POLL_S = 0.05


def home_mark(home: Path) -> str:
    """What the marks of all runs in `home` start with."""
    return hashlib.sha256(str(home.absolute()).encode()).hexdigest()[:16]


def mark_of(home: Path, run_id: str, part: str) -> str:
    """The mark of one part of one run."""
    return f"{home_mark(home)}:{run_id}:{part}"


def marked_processes(home: Path, part: str | None = None) -> list[psutil.Process]:
    """Living processes of any run in `home`, of `part` or of all parts, and what descends from them.

    Neither this process nor its ancestors are among them.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and _is_marked(process, home_mark(home), part):
                found.append(process)
    return with_descendants(found)


def _is_marked(process: psutil.Process, home: str, part: str | None) -> bool:
    fields = process.environ().get(MARK, "").split(":")
    return len(fields) == 3 and fields[0] == home and part in {None, fields[2]}


def with_descendants(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """`processes` and all that descend from them; not this process nor its ancestors."""
    found: dict[int, psutil.Process] = {}
    for process in processes:
        found[process.pid] = process
        with suppress(psutil.Error):
            found |= {child.pid: child for child in process.children(recursive=True)}
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    return [process for pid, process in found.items() if pid not in spared]


def is_gone(process: psutil.Process) -> bool:
    """Whether `process` has ended; one that waits to be reaped by its parent counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def send(processes: Iterable[psutil.Process], signal: Signals) -> None:
    """Send `signal` to each that still lives; psutil sees to it that a reused id is not hit."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(signal)


def await_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until all have ended or `timeout_s` have passed; return those that live."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if not is_gone(process)]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left = [process for process in left if not is_gone(process)]
    return left


def end(processes: Iterable[psutil.Process], *, patience_s: float) -> list[psutil.Process]:
    """SIGTERM, and SIGKILL to what is left after `patience_s`; return those that live on even so."""
    chosen = list(processes)
    if patience_s > 0:
        send(chosen, SIGTERM)
        chosen = await_gone(chosen, patience_s)
    send(chosen, SIGKILL)
    return await_gone(chosen, 5.0)
