"""How the commands of this package end when something is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from overtone.errors import OvertoneError


@contextmanager
def as_exit_code(*wrong: type[OvertoneError]) -> Iterator[Console]:
    """Within it an error of ours becomes a line on stderr, whose console is given, and the end of the command.

    The exit code is 2 for the kinds `wrong`, which the caller can mend, and 1 for the others.
    """
    console = Console(stderr=True)
    try:
        yield console
    except OvertoneError as error:
        console.print(f"[red]error:[/red] {escape(error.message)}", highlight=False)
        raise typer.Exit(2 if isinstance(error, wrong) else 1) from None
