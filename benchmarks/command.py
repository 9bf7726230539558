"""How the benchmarks run as commands."""

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.console import Console

from overtone.errors import ConfigurationError, OvertoneError


def run(command: Callable[..., Any]) -> None:
    """Run `command` with the options of the command line; an error of ours is a line on stderr and exit code 1.

    Told to end, it stops what it started.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        typer.run(command)
    except OvertoneError as error:
        Console(stderr=True).print(f"[red]{error.message}[/]")
        sys.exit(1)


def require_parts(only: Sequence[str] | None, parts: Sequence[str]) -> None:
    """Refuse what the option `--only` names beside `parts`.

    Raises:
        ConfigurationError: naming it and what there is.
    """
    if unknown := set(only or ()).difference(parts):
        raise ConfigurationError(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
