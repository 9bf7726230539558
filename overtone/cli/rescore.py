"""`overtone rescore`: predictions by what is served now, for the posts that were stored before it was."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from overtone.bundle import Bundle
    from overtone.settings import Settings


def rescore(  # noqa: PLR0913, PLR0917 - flags of the command line
    bundle: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Bundle to re-score with [default: the champion].")
    ] = None,
    champion: Annotated[bool, typer.Option("--champion", help="Re-score with what is served: the default.")] = False,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only posts made within this time, such as 7d [default: all].")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that classify.")] = 1,
    rate: Annotated[float | None, typer.Option(min=1, help="Posts a second at most [default: no limit].")] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to work on [default: one of this command's own]."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what there is to do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print lines of JSON, for programs.")] = False,
) -> int:
    """Give stored posts predictions by the champion. A run that was cut off is continued by the same command."""
    from datetime import UTC, datetime, timedelta

    from overtone.bundle import load_bundle
    from overtone.cli.database import reachable_database
    from overtone.cli.durations import parse_duration
    from overtone.errors import ConfigurationError
    from overtone.logging import configure
    from overtone.settings import load_settings
    from train.rescore import Wanted, conclude, showing
    from train.rescore import rescore as run

    if bundle is not None and champion:
        raise ConfigurationError("Give either --bundle or --champion.")
    configure("cli", "ERROR", "console")
    settings = load_settings()
    first = datetime.now(UTC) - timedelta(seconds=parse_duration(since, longest_days=3650)) if since else None
    chosen = load_bundle(bundle) if bundle else _champion(settings)
    wanted = Wanted(first, workers, rate=rate, is_dry_run=dry_run)
    console = Console(stderr=True)
    # An embedded database that is not up is started for the run.
    with reachable_database(settings), showing(console, as_json=as_json) as follow:
        report = run(settings, chosen, wanted, address, follow)
    conclude(console, report, is_dry_run=dry_run, as_json=as_json)
    return 0


def _champion(settings: "Settings") -> "Bundle":
    """What this home serves, or will at the next start."""
    from overtone.bundle import load_bundle
    from overtone.cli.rollout import load_rollout

    folder = load_rollout(settings.home).champion
    return load_bundle(Path(folder) if folder else settings.bundle)
