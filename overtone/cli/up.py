"""`overtone up`: start everything, keep it up, stop it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from overtone.cli.cleanup import stop_home
from overtone.cli.plan import make_plan
from overtone.cli.reports import PAGE, JsonReport, Report, TextReport
from overtone.cli.state import RunFolder, RunState
from overtone.cli.supervisor import Stopped, Supervisor
from overtone.errors import EnvironmentProblemError, UnavailableError
from overtone.logging import configure
from overtone.settings import Settings

_LOCK_TIMEOUT_S = 40.0
_DETACHED_TIMEOUT_S = 300.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line asked for."""

    seconds: float | None = None
    """How long to stay up, from when everything is; None for ever."""
    rate: float | None = None
    """Posts a second of the simulator; None for the setting's."""
    as_json: bool = False
    has_dashboard: bool | None = None
    """Whether to run Ray's dashboard; None to decide by the number of cores."""
    ingest_files: tuple[Path, ...] = ()
    """YAML files with options of the ingestion."""
    shows_link: bool = True
    """Whether to print a link that signs a browser in: not where the output goes to a log."""


def up(settings: Settings, options: UpOptions, console: Console) -> int:
    """Run the stack until it is asked to stop, or for `options.seconds`; return the exit code.

    Raises:
        OvertoneError: it cannot be started, or did not end as it should; nothing of it is left running.
    """
    report: Report = JsonReport(shows_link=options.shows_link) if options.as_json else TextReport(console)
    stop_asked = threading.Event()
    folder = RunFolder(settings.home)
    with _signals_set(stop_asked), _log_file(settings.home / "logs" / "up.log"):
        _take_over(settings, folder, report)
        try:
            return _run(settings, options, folder, report, stop_asked)
        finally:
            report.close()
            folder.unlock()


def up_detached(settings: Settings, arguments: list[str], console: Console, *, as_json: bool) -> int:
    """Start the stack in the background and return when it is up.

    Raises:
        OvertoneError: it runs already, or could not be started.
    """
    folder = RunFolder(settings.home)
    folder.make()
    report: Report = JsonReport() if as_json else TextReport(console)
    log_path = settings.home / "logs" / "detached.log"
    log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "overtone.cli", "up", "--json", "--no-link", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    state = _await_ready(folder, child, log_path, report)
    addresses = {**_page(settings, state), **state.addresses}
    report.ready(addresses, state.source, time.time() - state.started_at)
    report.close()
    if not as_json:
        said = " It runs in the background: `overtone status` shows it, `overtone down` stops it."
        console.print(said, soft_wrap=True)
    return 0


def _run(settings: Settings, options: UpOptions, folder: RunFolder, report: Report, stop_asked: threading.Event) -> int:
    plan = make_plan(
        settings, rate=options.rate, has_dashboard=options.has_dashboard, ingest_files=options.ingest_files
    )
    supervisor = Supervisor(plan, folder, report, stop_asked)
    began = time.monotonic()
    totals = None
    try:
        supervisor.start()
        supervisor.watch(options.seconds)
        totals = supervisor.finish()
    except Stopped:
        report.event("stack.stopping", "Stopping everything.")
        supervisor.wind_down()
        totals = supervisor.totals()
    finally:
        supervisor.stop()
    figures = {"posts_stored": totals.posts, "predictions_stored": totals.predictions} if totals else {}
    seconds = round(time.monotonic() - began, 1)
    report.finished({"seconds": seconds, **figures, "addresses": supervisor.addresses})
    return 0


def _take_over(settings: Settings, folder: RunFolder, report: Report) -> None:
    """Take the home's lock and stop what a predecessor left running.

    Raises:
        EnvironmentProblemError: the stack runs already, or its leftovers cannot be stopped.
    """
    if not folder.lock(_LOCK_TIMEOUT_S, give_up=lambda: _is_running(folder.load())):
        state = folder.load()
        who = f" (process {state.supervisor.pid})" if state else ""
        raise EnvironmentProblemError(
            f"Overtone runs already in {settings.home}{who}. `overtone status` shows it, `overtone down` stops it."
        )
    if folder.load() is not None:
        report.event("leftovers.stopping", "The last run did not end as it should: stopping what it left behind.")
    left = stop_home(settings.home, folder)
    if left:
        raise EnvironmentProblemError(f"Processes of an earlier run cannot be stopped: {', '.join(map(str, left))}.")


def _is_running(state: RunState | None) -> bool:
    return state is not None and state.supervisor.alive() is not None


@contextmanager
def _signals_set(stop_asked: threading.Event) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `stop_asked`; the third one gives up on order and leaves it to the guard."""
    received = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        stop_asked.set()
        if received >= 3:
            os._exit(130)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Send the log lines of this process to `path`: on the terminal they would run into what is shown there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    terminal = sys.stderr
    with path.open("a", encoding="utf-8", buffering=1) as file:
        sys.stderr = file
        configure("up")
        try:
            yield
        finally:
            sys.stderr = terminal
            configure("cli", "ERROR", "console")


def _await_ready(folder: RunFolder, child: "subprocess.Popen[bytes]", log_path: Path, report: Report) -> RunState:
    deadline = time.monotonic() + _DETACHED_TIMEOUT_S
    told: set[str] = set()
    while time.monotonic() < deadline:
        state = folder.load()
        if state is not None and state.supervisor.pid == child.pid:
            for part in state.parts:
                if part.name not in told:
                    told.add(part.name)
                    report.started(part)
            if state.phase == "ready":
                return state
        if child.poll() is not None:
            said = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise EnvironmentProblemError("Overtone did not start.\n" + "\n".join(said))
        time.sleep(0.1)
    child.terminate()
    raise UnavailableError(f"Overtone was not up after {_DETACHED_TIMEOUT_S:.0f} s. See {log_path}.")


def _page(settings: Settings, state: RunState) -> dict[str, str]:
    from overtone.cli.status import link_for

    return {PAGE: link_for(settings, state)}
