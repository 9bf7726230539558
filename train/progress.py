"""Showing a run while it goes: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Takes the reports of a run, from any one thread, and shows them on `console` until it is closed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn(
                    "{task.completed}/{task.total} steps  loss {task.fields[loss]}  {task.fields[speed]} texts/s"
                ),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("starting", total=None, loss="-", speed="-")

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Show `metrics` of one report of the training loop."""
        if self._bar:
            self._bar.update(
                self._task,
                description="training",
                total=metrics["steps"],
                completed=metrics["step"],
                loss=f"{metrics['loss']:.4f}",
                speed=f"{metrics['texts_per_s']:.0f}",
            )
        if "macro_recall" in metrics or not self._bar:
            self._console.print(line(metrics), highlight=False, soft_wrap=True)


Counted = Callable[[int, int], None]
"""Takes what is done and all there is."""


@contextmanager
def counted(console: Console, what: str) -> Iterator[Counted]:
    """A function that shows how much of `what` is done: a bar on a terminal, a line at every tenth elsewhere."""
    shown = 0

    def as_line(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            console.print(f"{what}: {done}/{total}", highlight=False)

    if not console.is_terminal:
        yield as_line
        return
    with Progress(console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def line(metrics: Mapping[str, Any]) -> str:
    """One report as text."""
    text = (
        f"step {metrics['step']}/{metrics['steps']}  epoch {metrics['epoch']:.2f}  loss {metrics['loss']:.4f}  "
        f"{metrics['texts_per_s']:.0f} texts/s"
    )
    if "macro_recall" in metrics:
        text += f"  validation: macro-averaged recall {metrics['macro_recall']:.4f}, accuracy {metrics['accuracy']:.4f}"
    return text
