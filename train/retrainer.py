"""The retrain policy as a detached Ray actor, for clusters without a cron."""

import asyncio
import threading
from contextlib import suppress
from typing import Any

import ray

from overtone.db.database import Database
from overtone.errors import ConfigurationError, OvertoneError
from overtone.logging import configure, get_logger
from overtone.settings import load_settings
from train.retrain import Decision, JobNeeds, Order, check
from train.submission import RayJobs

ACTOR_NAME = "overtone-retrain"
NAMESPACE = "overtone"

_log = get_logger()


class Retrainer:
    """Checks every `every_s` seconds, from its constructor on and after every restart.

    It builds its settings in its own process, from the environment and files of its node: nothing secret travels in
    its arguments.
    """

    def __init__(self, order: Order, address: str, needs: JobNeeds, every_s: float) -> None:
        self._settings = load_settings()
        configure("retrain", self._settings.log_level, self._settings.log_format)
        self._order, self._address, self._needs, self._every_s = order, address, needs, every_s
        self._last: dict[str, Any] | None = None
        self._error: str | None = None
        self._checks = 0
        threading.Thread(target=self._run, name="retrain", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """How many checks were made, what the last one decided, and the code of the error it ended in, if any."""
        return {"checks": self._checks, "every_s": self._every_s, "last": self._last, "error": self._error}

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            try:
                self._last, self._error = asyncio.run(self._check()).as_dict(), None
            except OvertoneError as error:
                self._error = error.code
                _log.warning("retrain.check_failed", code=error.code)
            self._checks += 1
            pause.wait(self._every_s)

    async def _check(self) -> Decision:
        if self._settings.database_url is None:
            raise ConfigurationError("DATABASE_URL is not set where the actor runs.")
        url = self._settings.database_url.get_secret_value()
        db = await Database.open(url, max_size=2, application_name="overtone-retrain")
        try:
            return await check(self._settings, db, self._order, lambda: RayJobs(self._address, self._needs))
        finally:
            await db.close()


def start_retrainer(order: Order, address: str, needs: JobNeeds, every_s: float) -> None:
    """Run the actor with these arguments, in place of one that runs. Ray must be connected.

    `address` is that of the job server.
    """
    stop_retrainer()
    actor: Any = (
        ray.remote(Retrainer)
        .options(name=ACTOR_NAME, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, num_cpus=0)
        .remote(order, address, needs, every_s)
    )
    ray.get(actor.status.remote())


def stop_retrainer() -> bool:
    """End the actor; whether there was one. Ray must be connected."""
    with suppress(ValueError):
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE), no_restart=True)
        return True
    return False
