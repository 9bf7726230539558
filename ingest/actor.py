"""The ingestion as a detached Ray actor: it runs by itself from its constructor on, after every restart too."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import ray

from ingest.options import MAX_STANDBYS, IngestOptions, suited_to
from ingest.pipeline import Ingestion
from overtone.errors import OvertoneError
from overtone.logging import configure, get_logger
from overtone.settings import Settings, load_settings

ACTOR_NAME = "overtone-ingest"
NAMESPACE = "overtone"

_log = get_logger()


class IngestActor:
    """Owns a thread with an event loop on which the ingestion runs.

    It builds its settings in its own process, from the environment and files of its node: nothing secret travels in
    its arguments.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        settings = load_settings()
        configure("ingest", settings.log_level, settings.log_format)
        chosen = None if options is None else IngestOptions.model_validate(options)
        self._ingestion = Ingestion(settings, suited_to(settings.x_api_base_url, chosen))
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        """See `Ingestion.status`."""
        return self._ingestion.status()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Stop reading, store and classify what was received; whether that was done within `timeout_s`."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._ingestion.run(self._stop))
        except OvertoneError:
            # Logged where it was raised, and `status` tells; the actor stays to be asked.
            return
        except BaseException:
            _log.exception("ingest.thread_ended")
            raise


def start_actors(
    settings: Settings, options: IngestOptions | None = None, *, metrics_folder: Path | None = None
) -> list[Any]:
    """The handles of the ingest actors, one and its standbys, which are started unless they run. Ray must be connected.

    `options` default to what suits `settings.x_api_base_url`. With `metrics_folder` the actors add their metrics to
    those of the other processes of the machine there. Everything else they take from their own settings.
    """
    chosen = suited_to(settings.x_api_base_url, options)
    # prometheus_client looks for the folder when it is imported, before any code of the actor runs.
    extra = {} if metrics_folder is None else {"PROMETHEUS_MULTIPROC_DIR": str(metrics_folder)}
    return [
        ray.remote(IngestActor)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": extra} if extra else None,
        )
        .remote(chosen.model_dump(mode="json"))
        for name in _names(chosen.leader.standbys)
    ]


def find_actors() -> list[Any]:
    """The handles of the ingest actors that run. Ray must be connected."""
    found = []
    for name in _names(MAX_STANDBYS):
        try:
            found.append(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            continue
    return found


def _names(standbys: int) -> list[str]:
    return [ACTOR_NAME, *(f"{ACTOR_NAME}-standby-{number}" for number in range(1, standbys + 1))]
