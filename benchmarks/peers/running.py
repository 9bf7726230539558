"""A peer's server, started in its own environment, checked against the engine, stopped whole."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.environments import interpreter
from overtone.bundle import Bundle, TextEncoder, to_prediction
from overtone.engine import classify_sorted, open_engine
from overtone.errors import UnavailableError
from overtone.hardware import usable_cores
from overtone.ports import free_ports
from overtone.settings import Settings, environment_for
from overtone.text import normalise

AGREEMENT = 0.98
"""Share of texts on which a peer's label must be ours; batches padded otherwise move a few that are near even."""

_START_S = 120
_ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def running(peer: Peer, settings: Settings, folder: Path) -> Iterator[str]:
    """Start `peer` with `folder` as its working directory; gives the root of its address.

    Raises:
        UnavailableError: it is not installed or did not start; the message holds the end of its log.
    """
    port = free_ports(1)[0]
    environment = environment_for(settings, PYTHONPATH=str(_ROOT), PYTHONUNBUFFERED="1")
    if settings.bundle is not None:
        environment["BUNDLE"] = str(settings.bundle.absolute())
    log = folder / f"{peer.name}.log"
    python = interpreter(peer)
    # As activating the environment does: peers start programs of theirs by name.
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    command = [str(python), "-m", peer.module, str(port), str(usable_cores())]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
    try:
        _await_ready(peer, process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def agreement(peer: Peer, url: str, bundle: Bundle, texts: list[str]) -> float:
    """The share of `texts` that `peer` gives the label the engine gives.

    Raises:
        UnavailableError: it answered with another status than 200, or not in the form that was expected.
    """
    token_ids = TextEncoder(bundle).encode(texts)
    engine = open_engine(bundle)
    ours = [to_prediction(bundle, row).label for row in classify_sorted(engine, token_ids)]
    engine.close()
    theirs: list[str] = []
    for start in range(0, len(texts), 32):
        response = httpx.post(url + peer.path, json=peer.body(prepared(peer, texts[start : start + 32])), timeout=60)
        if response.status_code != 200:
            raise UnavailableError(f"answered {response.status_code}: {response.text[:300]}")
        try:
            theirs += peer.labels(response.json())
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UnavailableError(f"answered in an unexpected form ({error!r})") from error
    if len(theirs) != len(ours):
        raise UnavailableError(f"answered {len(theirs)} labels for {len(ours)} texts")
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(texts)


def prepared(peer: Peer, texts: list[str]) -> list[str]:
    """`texts` as they are sent to `peer`."""
    return texts if peer.normalises else [normalise(text) for text in texts]


def _await_ready(peer: Peer, process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    one = peer.body(["I love this"])
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            # A worker that still loads may answer the ready path, so it counts only with a prediction.
            is_up = httpx.get(url + peer.ready_path, timeout=30).status_code == 200
            if is_up and httpx.post(url + peer.path, json=one, timeout=60).status_code == 200:
                return
        time.sleep(0.5)
    why = f"ended with {process.returncode}" if process.poll() is not None else f"was not ready after {_START_S} s"
    raise UnavailableError(f"{why}: {log.read_text(encoding='utf-8', errors='replace').strip()[-1500:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    _, left = psutil.wait_procs(family, timeout=5)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(15)
