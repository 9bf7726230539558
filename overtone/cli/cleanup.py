"""Stopping all that runs in a home, whoever started it and however that one ended. The caller holds the lock."""

import shutil
from contextlib import suppress
from pathlib import Path

import psutil

from overtone.cli.processes import end, is_gone, marked_processes, with_descendants
from overtone.cli.state import RunFolder, RunState
from overtone.db.embedded import EmbeddedPostgres
from overtone.logging import get_logger
from serve.environment import haproxy_pids, runtime_folder

RAY = "ray"
POSTGRES = "postgres"

_ROUNDS = 10
_KEPT_SESSIONS = 2

_log = get_logger()


def embedded_postgres(home: Path) -> EmbeddedPostgres:
    """The server of `home`."""
    return EmbeddedPostgres(home / "postgres", runtime_folder(home) / "pg")


def ray_folder(home: Path) -> Path:
    """Where Ray keeps the sessions of `home`."""
    return runtime_folder(home) / "ray" / "t"


def stop_home(home: Path, folder: RunFolder) -> list[int]:
    """Stop every process of every run in `home`; return the ids of those that could not be stopped.

    What reads and writes posts ends before the database does, so that nothing is cut off in the middle of a write.
    """
    left = _stop_processes(home, folder.load())
    if (home / "postgres").exists():
        embedded_postgres(home).stop()
    if left:
        _log.error("stack.not_stopped", pids=[process.pid for process in left])
    else:
        folder.forget()
        shutil.rmtree(folder.metrics, ignore_errors=True)
        drop_old_sessions(ray_folder(home), keep=_KEPT_SESSIONS)
    return [process.pid for process in left]


def stop_ray(home: Path) -> None:
    """Stop Ray and all that runs on it.

    At once: Ray's own way of ending takes half a minute and keeps nothing that would be of use afterwards.
    """
    for _ in range(_ROUNDS):
        # What was being started while its parent was ended shows only in the next round.
        left = [*marked_processes(home, RAY), *_haproxies(home)]
        if not left:
            return
        end(left, patience_s=0.0)


def drop_old_sessions(ray_folder: Path, keep: int) -> None:
    """Remove the folders of all but the last `keep` Ray sessions."""
    sessions = sorted(path for path in ray_folder.glob("session_2*") if path.is_dir())
    for path in sessions[: max(0, len(sessions) - keep)]:
        shutil.rmtree(path, ignore_errors=True)


def _stop_processes(home: Path, state: RunState | None) -> list[psutil.Process]:
    recorded = {part.name: part.process.alive() for part in (state.parts if state else ()) if part.process}
    known = [process for name, process in recorded.items() if process and name not in {RAY, POSTGRES}]
    end(known, patience_s=3.0)
    stop_ray(home)
    left: list[psutil.Process] = []
    for _ in range(_ROUNDS):
        known = [process for name, process in recorded.items() if process and name != POSTGRES]
        left = [*marked_processes(home), *(process for process in with_descendants(known) if not is_gone(process))]
        if not left:
            break
        left = end(left, patience_s=0.0)
    return left


def _haproxies(home: Path) -> list[psutil.Process]:
    found = []
    for pid in haproxy_pids(runtime_folder(home)):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if not is_gone(process):
                found.append(process)
    return found
