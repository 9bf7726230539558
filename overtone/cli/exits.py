"""Exit codes of the command, assigned here and nowhere else, and how an error is told."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

from overtone import errors

EXIT_CODES: Mapping[type[errors.OvertoneError], int] = {
    errors.OvertoneError: 1,
    errors.ConfigurationError: 2,
    errors.InvalidInputError: 3,
    errors.UnauthorizedError: 4,
    errors.NotFoundError: 5,
    errors.NotReadyError: 6,
    errors.UnavailableError: 6,
    errors.OverloadedError: 6,
    errors.DeadlineExceededError: 6,
    errors.EnvironmentProblemError: 7,
    errors.BundleError: 8,
    errors.EngineError: 9,
    errors.DataError: 10,
    errors.StreamError: 11,
    errors.ClusterError: 12,
    errors.ClusterForbiddenError: 4,
    errors.ClusterUnavailableError: 6,
    errors.ClusterTimeoutError: 13,
    errors.RolloutError: 14,
}
"""The exit code of each class of error, or of the nearest class above it. Typer's own usage errors are 2 too."""

INTERRUPTED = 130


def exit_code(error: BaseException) -> int:
    """The exit code for `error`."""
    for cls in type(error).__mro__:
        if cls in EXIT_CODES:
            return EXIT_CODES[cls]
    return 1


def error_of(code: str) -> type[errors.OvertoneError]:
    """The class of error with this code; the most general one for a code that is not known."""
    waiting: list[type[errors.OvertoneError]] = [errors.OvertoneError]
    for cls in waiting:
        if cls.code == code:
            return cls
        waiting += cls.__subclasses__()
    return errors.OvertoneError


def tell(error: BaseException, console: Console, *, with_trace: bool) -> int:
    """Say on `console` what went wrong and return the exit code."""
    if with_trace:
        console.print_exception()
    elif isinstance(error, errors.OvertoneError):
        console.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True, highlight=False)
    else:
        console.print(
            f"[bold red]Error:[/] {type(error).__name__}: {escape(str(error))}\n"
            "This should not happen. Run the command again with --debug to see where it comes from.",
            soft_wrap=True,
            highlight=False,
        )
    return exit_code(error)
