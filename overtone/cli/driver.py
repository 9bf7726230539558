"""The one process that talks to Ray for the supervisor.

`python -m overtone.cli.driver ADDRESS METRICS_FOLDER [INGEST_FILE ...]` connects to the Ray instance at ADDRESS, then
obeys one word a line on standard input (`serve`, `jobs`, `models`, `ingest`, `stop-ingest`) and answers each on
standard output with a line of JSON: `{"done": WORD, "seconds": S}` or `{"failed": WORD, "code": C, "message": TEXT}`.
The end of standard input ends it. A process of its own, because Ray installs signal handlers, starts threads and keeps
150 MB that a supervisor must not have.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from overtone.errors import OvertoneError, StreamFatalError, UnavailableError
from overtone.logging import configure, get_logger
from overtone.settings import Settings, load_settings

_CONNECT_TIMEOUT_S = 150.0
_STOP_TIMEOUT_S = 15.0
_FIRST_CONNECT_S = 10.0
"""How long a start waits for the stream; it goes on trying after that."""

_log = get_logger()


def main(arguments: list[str]) -> int:
    """Serve the supervisor until it closes standard input; 1 when Ray cannot be reached."""
    answers = _own_stdout()
    settings = load_settings()
    configure("driver", settings.log_level)
    commands: dict[str, Callable[[Settings], dict[str, object] | None]] = {
        "serve": lambda settings: _serve(settings, arguments[0], Path(arguments[1])),
        "jobs": lambda settings: _jobs(settings, Path(arguments[1])),
        "models": _models,
        "ingest": lambda settings: _ingest(settings, *map(Path, arguments[1:])),
        "stop-ingest": _stop_ingest,
    }
    if not _obey(answers, "connect", lambda _: _connect(arguments[0]), settings):
        return 1
    for line in sys.stdin:
        word = line.strip()
        _obey(answers, word, commands[word], settings)
    return 0


def _own_stdout() -> int:
    """A descriptor for answers alone: what libraries print on standard output goes to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def _obey(answers: int, word: str, command: Callable[[Settings], dict[str, object] | None], settings: Settings) -> bool:
    started = time.monotonic()
    answer: dict[str, object]
    try:
        details = command(settings) or {}
        answer = {"done": word, "seconds": round(time.monotonic() - started, 3), **details}
    except Exception as error:  # the edge: whatever happened is told to the supervisor
        _log.error("driver.failed", command=word, exc_info=True)
        code = error.code if isinstance(error, OvertoneError) else "internal"
        answer = {"failed": word, "code": code, "message": str(error).strip() or type(error).__name__}
    os.write(answers, json.dumps(answer).encode() + b"\n")
    return "done" in answer


def _connect(address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            ray.init(address=address, namespace="overtone", log_to_driver=False, configure_logging=False)
            return
        # Ray says ConnectionError, an OSError, for a head that takes connections but has no node yet.
        except OSError as error:
            ray.shutdown()
            if time.monotonic() > deadline:
                raise UnavailableError(f"Ray does not answer on {address}.") from error
            time.sleep(0.1)


def _serve(settings: Settings, address: str, metrics: Path) -> None:
    from overtone.cli.rollout import load_rollout, save_running
    from serve.app import ServeArgs, deploy

    args = {"metrics_folder": str(metrics), "replicas": settings.serve_replicas}
    live = load_rollout(settings.home).live()
    deploy(ServeArgs.model_validate(args | {"live": live}), host=settings.api_host, port=settings.api_port)
    save_running(settings.home, address, args)


def _jobs(settings: Settings, metrics: Path) -> None:
    """Have the consumers of jobs started, and do not wait for them."""
    from serve.app import JobsArgs, deploy_jobs

    number = settings.job_consumers
    if number:
        deploy_jobs(JobsArgs(min_consumers=number, max_consumers=number, metrics_folder=str(metrics)))


def _models(settings: Settings) -> dict[str, object]:
    """Give the replicas that run what `overtone models` wrote down, and nothing else."""
    from ray import serve

    from overtone.cli.rollout import load_rollout, load_running
    from serve.app import ServeArgs, deploy
    from serve.environment import APPLICATION, DEPLOYMENT

    _, args = load_running(settings.home)
    live = load_rollout(settings.home).live()
    # Serve looks once a second whether all have it; the command asks them more often.
    deploy(ServeArgs.model_validate(args | {"live": live}), host=settings.api_host, port=settings.api_port, wait=False)
    states = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].replica_states
    return {"replicas": sum(states.values())}


def _ingest(settings: Settings, metrics: Path, *files: Path) -> None:
    import ray

    from ingest.actor import start_actors
    from ingest.options import load_options

    actors = start_actors(settings, load_options(files) if files else None, metrics_folder=metrics)
    deadline = time.monotonic() + _FIRST_CONNECT_S
    while time.monotonic() < deadline:
        statuses = ray.get([actor.status.remote() for actor in actors], timeout=_CONNECT_TIMEOUT_S)
        if any(status["connected"] for status in statuses):
            return
        for status in statuses:
            if status["state"] == "stopped":
                raise StreamFatalError(f"The ingestion has stopped: {status['last_error']}")
        time.sleep(0.1)
    _log.warning("ingest.not_connected_yet", reason=next(filter(None, (one["last_error"] for one in statuses)), None))


def _stop_ingest(_settings: Settings) -> None:
    import ray

    from ingest.actor import find_actors

    # All at once: none takes over from another.
    ray.get([actor.stop.remote(_STOP_TIMEOUT_S) for actor in find_actors()], timeout=_STOP_TIMEOUT_S + 2.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
