"""The reports of a run, on their way from Ray's controller process to the process that started it.

The controller imports this module, so it imports little: what training needs takes seconds.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

from ray.exceptions import RayError
from ray.train import UserCallback
from ray.util.queue import Queue

from overtone.logging import get_logger

Follow = Callable[[dict[str, Any]], None]
"""Takes the metrics of one report of the first worker."""


class Forward(UserCallback):
    """Sends each report from Ray's controller process to the process that started the run."""

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._reports.put(metrics[0])


@contextmanager
def following(reports: Queue, follow: Follow) -> Iterator[None]:
    """Call `follow`, in another thread, with what is put into `reports` during the block; the queue ends with it."""
    ended = threading.Event()

    def drain() -> None:
        while True:
            finishing = ended.is_set()
            try:
                while True:
                    follow(reports.get(timeout=0.5))
            except Empty:
                if finishing:
                    return
            except RayError as error:
                get_logger().warning("train.reports_lost", reason=type(error).__name__)
                return

    thread = threading.Thread(target=drain, name="train-reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
        reports.shutdown(force=True)
