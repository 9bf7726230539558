"""The queue of tasks, as Celery sees it: in Redis, or in files of the home where there is no Redis.

`celery -A serve.broker inspect ping` and Celery's other commands work with this module. It knows no Ray: consumers and
whoever gives them work are configured alike from here.
"""

import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps
from redis.exceptions import RedisError

from overtone.errors import UnavailableError
from overtone.settings import Settings, load_settings

QUEUE = "overtone-jobs"
FAILED_QUEUE = "overtone-jobs-failed"
"""The dead queue: tasks that failed at every attempt, or that trying again cannot help."""
UNKNOWN_QUEUE = "overtone-jobs-unknown"
"""Tasks that no consumer knows."""
QUEUES = (QUEUE, FAILED_QUEUE, UNKNOWN_QUEUE)
MAX_RETRIES = 10
BACKEND_URL = "cache+memory://"
"""Nobody asks Celery for results: what became of a task is in the database."""

_FILES = "overtone-files"
_VISIBILITY_S = 3600
"""After so long Redis gives a task again that was taken and not acknowledged. One whose consumer died is given again
much sooner, from the database."""
_SOCKET_TIMEOUT_S = 10.0
_AWAY = (OperationalError, RedisError, OSError)


class _FileChannel(filesystem.Channel):
    """Kombu's channel of files, which writes a message where a reader may take it before it is whole."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override]  # as Kombu's own does
        folder = Path(self.data_folder_out)
        name = f"{time.time_ns()}_{uuid4()}.{queue}.msg"
        draft = folder / f".{name}"
        draft.write_text(dumps(payload), encoding="utf-8")
        draft.replace(folder / name)


class FileTransport(filesystem.Transport):
    """The broker of files."""

    Channel = _FileChannel


TRANSPORT_ALIASES[_FILES] = f"{__name__}:{FileTransport.__name__}"


def broker_url(settings: Settings) -> str:
    """The address of the broker, as Celery takes it."""
    if settings.redis_url is None:
        return f"{_FILES}://"
    url = settings.redis_url.get_secret_value()
    return url.replace("unix://", "redis+socket://", 1) if url.startswith("unix://") else url


def transport_options(settings: Settings) -> dict[str, Any]:
    """How the broker is spoken to. The folders of the file broker are made."""
    if settings.redis_url is not None:
        return {
            "global_keyprefix": "overtone:celery:",
            "visibility_timeout": _VISIBILITY_S,
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_connect_timeout": _SOCKET_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 15,
        }
    root = settings.home / "broker"
    folders = {"data": root / "messages", "control": root / "control"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "data_folder_in": str(folders["data"]),
        "data_folder_out": str(folders["data"]),
        "control_folder": str(folders["control"]),
    }


def celery_options(settings: Settings) -> dict[str, Any]:
    """The options of Celery that consumers and producers share."""
    return {
        "broker_connection_retry_on_startup": True,
        # A Redis that is away stays away as long as it likes.
        "broker_connection_max_retries": None,
        "broker_connection_timeout": _SOCKET_TIMEOUT_S,
        **({"broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED}} if _is_tls(settings) else {}),
        "task_publish_retry": False,
        "worker_prefetch_multiplier": 1,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_remote_control": True,
        "task_serializer": "json",
        "accept_content": ["json"],
    }


def make_app(settings: Settings) -> Celery:
    """A Celery application that gives tasks, and inspects and controls those who do them."""
    app = Celery(QUEUE, broker=broker_url(settings), backend=BACKEND_URL, set_as_current=False)
    app.conf.update(
        **celery_options(settings),
        broker_transport_options=transport_options(settings),
        task_ignore_result=True,
        task_default_queue=QUEUE,
    )
    return app


class Broker:
    """Gives tasks to the queue, and tells how long it is. Blocking; one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)

    def send(self, task: str, arguments: Sequence[Any]) -> None:
        """Put a task into the queue.

        Raises:
            UnavailableError: the broker does not answer; whether the task is in the queue is not known.
        """
        try:
            self._app.send_task(task, args=list(arguments), queue=QUEUE, ignore_result=True)
        except _AWAY as error:
            raise UnavailableError(f"The broker does not answer: {type(error).__name__}.") from error

    def lengths(self) -> Mapping[str, int]:
        """How many tasks wait in each of `QUEUES`.

        Raises:
            UnavailableError: the broker does not answer.
        """
        try:
            with self._app.connection_for_read() as connection:
                channel = connection.default_channel
                return {name: channel.queue_declare(queue=name).message_count for name in QUEUES}
        except _AWAY as error:
            raise UnavailableError(f"The broker does not answer: {type(error).__name__}.") from error

    def close(self) -> None:
        """Close the connections."""
        self._app.close()


def _is_tls(settings: Settings) -> bool:
    return settings.redis_url is not None and settings.redis_url.get_secret_value().startswith("rediss://")


def __getattr__(name: str) -> Any:
    """`app`, made when Celery's command asks for it, so that importing this module reads no settings."""
    if name == "app":
        return make_app(load_settings())
    raise AttributeError(name)
