"""The end of the API: no further connection is taken, and every request under way is answered."""

import os
import socket
import time
from contextlib import closing, suppress
from pathlib import Path
from signal import SIGUSR1

from serve.environment import haproxy_pids

_POLL_S = 0.05
_CALM_LOOKS = 3
"""Looks without a request under way: one whose head has not been read yet does not show."""
_PROMPT = b"\n> "


def drain_api(folder: Path, timeout_s: float) -> bool:
    """End the API of the stack with `folder` (see `runtime_folder`) softly; False if not all was answered in time.

    HAProxy closes each connection with its next answer and waits for idle ones as well, so its end is not what is
    waited for: it is asked for its requests, by a connection from before, since it takes no other. Those that it had
    before its configuration was last changed are not seen. Without HAProxy nothing is waited for.
    """
    proxies = haproxy_pids(folder)
    admin = _admin(folder)
    if admin is None:
        return True
    with closing(admin):
        try:
            _ask(admin, b"prompt\n")
            for pid in proxies:
                with suppress(ProcessLookupError):
                    os.kill(pid, SIGUSR1)
            return _await_calm(admin, time.monotonic() + timeout_s)
        except OSError:  # it has ended, so there is nothing left
            return True


def _admin(folder: Path) -> socket.socket | None:
    for path in folder.rglob("admin.sock"):
        admin = socket.socket(socket.AF_UNIX)
        admin.settimeout(5.0)
        try:
            admin.connect(str(path))
        except OSError:
            admin.close()
            continue
        return admin
    return None


def _await_calm(admin: socket.socket, deadline: float) -> bool:
    calm = 0
    while calm < _CALM_LOOKS:
        if time.monotonic() > deadline:
            return False
        calm = 0 if _has_requests(admin) else calm + 1
        time.sleep(_POLL_S)
    return True


def _has_requests(admin: socket.socket) -> bool:
    lines = _ask(admin, b"show sess\n").splitlines()
    return any(b" fe=" in line and b" fe=GLOBAL" not in line for line in lines)


def _ask(admin: socket.socket, command: bytes) -> bytes:
    admin.sendall(command)
    answer = b""
    while not answer.endswith(_PROMPT):
        data = admin.recv(65536)
        if not data:
            raise ConnectionResetError
        answer += data
    return answer
