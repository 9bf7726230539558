"""The consumers of tasks: Celery workers in replicas of Ray Serve.

Each replica runs a worker of Celery in a thread, which takes tasks from the queue, and an event loop in another, on
which the work itself is done, leases are kept and due chunks are given to the queue.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from uuid import UUID

from celery import current_task
from ray import serve
from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
from ray.serve.task_consumer import task_consumer, task_handler
from ray.serve.task_processor import CeleryTaskProcessorAdapter
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from overtone import logging
from overtone.db.database import Database
from overtone.db.jobs import ChunkName, Holders
from overtone.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    OvertoneError,
    UnavailableError,
)
from overtone.logging import get_logger
from overtone.metrics import forget_dead_processes
from overtone.rotation import Rotation
from overtone.settings import Settings, load_settings
from serve.broker import (
    BACKEND_URL,
    FAILED_QUEUE,
    MAX_RETRIES,
    QUEUE,
    UNKNOWN_QUEUE,
    Broker,
    broker_url,
    celery_options,
    transport_options,
)
from serve.chores import CHORE, Chores
from serve.environment import is_loopback
from serve.loopback import keep_handle_port_on_loopback
from serve.scoring import SCORE, ApiClassifier, Dispatcher, Scorer

CONSUMER = "Consumer"
CONCURRENCY = 4
"""Chunks that a consumer works on at once: as many as keep the engines of a node busy, for it does little itself."""
_STEP_S = 1.0
_HOLD_S = 30.0
_TIDY_S = 600.0
_OPEN_S = 60.0

Result = TypeVar("Result")


class Adapter(CeleryTaskProcessorAdapter):
    """Ray's adapter for Celery, with the broker of this process's settings.

    The configuration of a deployment is public in a Ray cluster, and the address of a broker holds a password.
    """

    def __init__(self, config: TaskProcessorConfig) -> None:
        settings = load_settings()
        adapter_config = config.adapter_config.model_copy(
            update={
                "broker_url": broker_url(settings),
                "broker_transport_options": transport_options(settings),
                "app_custom_config": celery_options(settings),
            }
        )
        super().__init__(config.model_copy(update={"adapter_config": adapter_config}))

    @property
    def is_working(self) -> bool:
        """Whether the worker lives."""
        thread = self._worker_thread
        return thread is not None and bool(thread.is_alive())

    def start_consumer(self, **_: Any) -> None:
        """Start the worker, without the talk among workers that nobody here listens to."""
        self._worker_hostname = f"{QUEUE}_{serve.get_replica_context().replica_tag}"
        options = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"]
        arguments = ["worker", f"--hostname={self._worker_hostname}", "-Q", QUEUE, *options]
        # A daemon: a worker that waits for a broker which is away must not keep the process from ending.
        self._worker_thread = threading.Thread(target=self._app.worker_main, args=(arguments,), daemon=True)
        self._worker_thread.start()


@task_consumer(
    task_processor_config=TaskProcessorConfig(
        queue_name=QUEUE,
        adapter=Adapter,
        adapter_config=CeleryAdapterConfig(
            broker_url="",
            backend_url=BACKEND_URL,
            task_custom_config={"ignore_result": True, "retry_jitter": True},
        ),
        max_retries=MAX_RETRIES,
        failed_task_queue_name=FAILED_QUEUE,
        unprocessable_task_queue_name=UNKNOWN_QUEUE,
    )
)
class Consumer:
    """Does the tasks of the queue. Settings come from the environment of this process."""

    _adapter: Adapter

    def __init__(self) -> None:
        settings = load_settings()
        logging.configure("jobs", settings.log_level, settings.log_format)
        if is_loopback(settings.api_host):
            keep_handle_port_on_loopback()
        if settings.prometheus_multiproc_dir is not None:
            forget_dead_processes(settings.prometheus_multiproc_dir)
        self._work = Work(settings)

    @task_handler(name=SCORE)
    def score_chunk(self, job_id: str, number: int) -> None:
        """Score one chunk of a job, be that lines of an upload or stored posts.

        Raises:
            OvertoneError: Celery is to deliver the task again, or to put it into the dead queue.
        """
        is_last_try = current_task.request.retries >= MAX_RETRIES
        self._work.score(ChunkName(UUID(job_id), number), is_last_try=is_last_try)

    @task_handler(name=CHORE)
    def do_chore(self, job_id: str, number: int) -> None:
        """Do a chore.

        Raises:
            OvertoneError: as above.
        """
        is_last_try = current_task.request.retries >= MAX_RETRIES
        self._work.do_chore(ChunkName(UUID(job_id), number), is_last_try=is_last_try)

    def check_health(self) -> None:
        """Raise if this consumer takes no tasks any more, so that Serve replaces it.

        Raises:
            UnavailableError: the worker or the loop has ended.
        """
        if not self._adapter.is_working or not self._work.is_alive:
            raise UnavailableError("The consumer has stopped.")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serve.scaling.scale_by_queue` decides by."""
        return {"queue_length": float(self._work.waiting)}


class Work:
    """What a consumer does, on an event loop of its own. For any number of threads."""

    def __init__(self, settings: Settings) -> None:
        """Start the loop; it connects to the database when that answers."""
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._opened = threading.Event()
        self._scorer: Scorer | None = None
        self._chores: Chores | None = None
        self._dispatcher: Dispatcher | None = None
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Tasks in the queue, when it was last seen."""
        return self._dispatcher.waiting if self._dispatcher else 0

    def score(self, name: ChunkName, *, is_last_try: bool) -> None:
        """See `Scorer.score`. Blocking."""
        self._require_opened()
        assert self._scorer is not None
        self._await(self._scorer.score(name, is_last_try=is_last_try))

    def do_chore(self, name: ChunkName, *, is_last_try: bool) -> None:
        """See `Chores.do`. Blocking."""
        self._require_opened()
        assert self._chores is not None
        self._await(self._chores.do(name, is_last_try=is_last_try))

    def _require_opened(self) -> None:
        if not self._opened.wait(_OPEN_S):
            raise DatabaseUnavailableError(f"The database did not answer within {_OPEN_S:.0f} s.")

    def _await(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        settings = self._settings
        db = await _opened_database(settings)
        holders, rotation = Holders(_HOLD_S), Rotation(settings)
        self._scorer = Scorer(db, settings.jobs_path, api_classifier(settings, lambda: rotation.settings), holders)
        self._chores = Chores(settings, db, holders)
        self._dispatcher = Dispatcher(
            db, Broker(settings), settings.jobs_path, QUEUE, keep_days=settings.retention_jobs_days
        )
        self._opened.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(_every(_STEP_S, self._dispatcher.step))
            group.create_task(_every(_HOLD_S / 4, lambda: holders.speak(db)))
            group.create_task(_every(_TIDY_S, self._dispatcher.tidy))
            group.create_task(rotation.keep_fresh())


def api_classifier(settings: Settings, current: Callable[[], Settings]) -> ApiClassifier:
    """The API that `settings` describe, asked as the installation itself, with the key that `current` settings have."""
    return ApiClassifier(settings.api_url, settings.api_key_header, lambda: current().read_api_key())


async def _opened_database(settings: Settings) -> Database:
    if settings.database_url is None:
        raise ConfigurationError("Jobs need DATABASE_URL.")
    trying = AsyncRetrying(
        retry=retry_if_exception_type(DatabaseUnavailableError),
        wait=wait_exponential(multiplier=0.5, max=15.0),
        before_sleep=lambda _: get_logger().warning("database.awaited", reason=DatabaseUnavailableError.code),
    )
    url = settings.database_url.get_secret_value()
    database: Database = await trying(Database.open, url, max_size=CONCURRENCY + 2, application_name="overtone-jobs")
    return database


async def _every(seconds: float, step: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Do `step` again and again; what goes wrong is told and tried again."""
    while True:
        started = time.monotonic()
        try:
            await step()
        except OvertoneError as error:
            get_logger().warning("jobs.step_failed", code=error.code)
        except Exception:  # the loop must live: without it no chunk is held or given
            get_logger().error("jobs.step_failed", code="internal", exc_info=True)
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - started)))


deployment: Any = serve.deployment(name=CONSUMER)(Consumer)
"""`Consumer`, as Serve takes it."""
