"""The Ray cluster that a command works on: one that is there, or one of its own."""

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from overtone.errors import EnvironmentProblemError
from overtone.settings import set_default_environment


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address`, or run one of our own for the time of the block.

    Our own listens on loopback, asks for a random token that no file keeps, and leaves nothing behind.

    Raises:
        EnvironmentProblemError: the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    folder = None if address else tempfile.mkdtemp(prefix="overtone-")
    try:
        _connect(address, folder)
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def quiet_data_context() -> Any:
    """Ray Data's settings in this process: it draws and prints nothing, and its log stays in the session's files."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    return context


def _connect(address: str | None, folder: str | None) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address:
            ray.init(address, **common)
            return
        # Ray wants a token here and, finding none, writes one to ~/.ray, where every later `ray start` obeys it.
        # Nobody takes this machine away with notice, which Ray Train would have a process of its own look out for.
        # Workers, 15 nicer by default, would wait for whichever process of Ray's wakes up, and their step with them.
        set_default_environment(
            RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0", RAY_worker_niceness="0"
        )
        ray.init(
            "local",
            include_dashboard=False,
            object_store_memory=256 * 2**20,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            **common,
        )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        where = address or "on this machine"
        raise EnvironmentProblemError(
            f"Ray cannot be {'reached at' if address else 'started'} {where}: {error}"
        ) from error
