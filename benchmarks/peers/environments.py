"""A virtual environment for each peer, made on demand and kept in the user's cache."""

import subprocess
import sys
from pathlib import Path

from benchmarks.peers.catalogue import Peer
from overtone.errors import UnavailableError

CACHE = Path("~/.cache/overtone/peers")
LOCK = "lock.txt"
_DONE = "installed.txt"


def environment(peer: Peer) -> Path:
    """The folder of its environment, which may not exist."""
    return CACHE.expanduser() / peer.name


def interpreter(peer: Peer) -> Path:
    """Its Python.

    Raises:
        UnavailableError: the environment is missing or was made from other requirements.
    """
    if not is_installed(peer):
        raise UnavailableError(f"not installed; run: python -m benchmarks.peers install {peer.name}")
    return environment(peer) / "bin" / "python"


def is_installed(peer: Peer) -> bool:
    """Whether its environment holds what its requirements say now."""
    try:
        return (environment(peer) / _DONE).read_text(encoding="utf-8") == _wanted(peer)
    except OSError:
        return False


def install(peer: Peer) -> None:
    """Make its environment; minutes, and up to 1.6 GB.

    Raises:
        UnavailableError: pip failed; the message holds the end of what it said.
    """
    folder = environment(peer)
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    files = ["-r", str(peer.folder / "requirements.txt"), "-c", str(peer.folder / LOCK)]
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *files])
    (folder / _DONE).write_text(_wanted(peer), encoding="utf-8")


def _wanted(peer: Peer) -> str:
    return "".join((peer.folder / name).read_text(encoding="utf-8") for name in ("requirements.txt", LOCK))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UnavailableError(f"`{' '.join(command[1:4])} ...` failed: {result.stderr.strip()[-1500:]}")
