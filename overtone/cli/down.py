"""`overtone down`: stop everything that runs in this home."""

import time
from signal import SIGKILL, SIGTERM

from rich.console import Console

from overtone.cli.cleanup import stop_home
from overtone.cli.processes import await_gone, marked_processes, send
from overtone.cli.state import RunFolder
from overtone.errors import EnvironmentProblemError
from overtone.settings import Settings

_PATIENCE_S = 75.0


def down(settings: Settings, console: Console) -> int:
    """Stop the stack of this home and what any earlier run left behind; 0 when nothing is left.

    Raises:
        EnvironmentProblemError: something cannot be stopped.
    """
    if not settings.home.exists():
        console.print(f"Nothing runs in {settings.home}: there is no such folder.")
        return 0
    began = time.monotonic()
    folder = RunFolder(settings.home)
    state = folder.load()
    supervisor = state.supervisor.alive() if state else None
    if supervisor is not None:
        console.print(f"Stopping Overtone (process {supervisor.pid}).")
        send([supervisor], SIGTERM)
        if await_gone([supervisor], _PATIENCE_S):
            send([supervisor], SIGKILL)
            await_gone([supervisor], 5.0)
    # A guard at work holds the lock until it is done.
    if not folder.lock(_PATIENCE_S):
        raise EnvironmentProblemError(f"Another command is starting or stopping Overtone in {settings.home}.")
    try:
        had_leftovers = bool(marked_processes(settings.home)) or folder.load() is not None
        left = stop_home(settings.home, folder)
    finally:
        folder.unlock()
    if left:
        raise EnvironmentProblemError(f"These processes could not be stopped: {', '.join(map(str, left))}.")
    if supervisor is None and not had_leftovers:
        console.print(f"Nothing ran in {settings.home}.")
    else:
        console.print(f"Everything is stopped, after {time.monotonic() - began:.1f} s.")
    return 0
