"""`overtone ingest`: what reading from X costs, what was missed, and by which rules posts come."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from overtone.settings import Settings

app = typer.Typer(help="Reading from X: its cost, its gaps, its rules.", no_args_is_help=True)

Files = Annotated[
    list[Path] | None,
    typer.Option("--ingest", metavar="FILE", help="YAML options of the ingestion; may be repeated, a later file wins."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command("spend")
def spend(ingest: Files = None, as_json: AsJson = False) -> int:
    """Show how many posts were read today and this month, what they cost, and where the month will end."""
    from ingest.options import load_options
    from ingest.pipeline import billed
    from ingest.spend import forecast
    from overtone.cli.database import with_database
    from overtone.db.usage import usage_since

    settings = _settings()
    resource, options = billed(settings.x_api_base_url, load_options(ingest or ()).spend)
    today = datetime.now(UTC).date()
    days = with_database(settings, lambda db: usage_since(db, today - timedelta(days=40), resource))
    seen = forecast(days, today, options.resets_on_day, options.post_usd)
    console, cap = Console(), options.monthly_posts
    if as_json:
        console.print_json(json.dumps({"resource": resource, "cap": cap, **asdict(seen)}, default=str))
        return 0
    of_cap = f" of {cap}" if cap else ""
    console.print(
        f"{resource}: {seen.today} today, {seen.used}{of_cap} since {seen.first_day} ({seen.cost_usd:.2f} USD).",
        f"By {seen.next_period} it will be {seen.projected} ({seen.projected_usd:.2f} USD) if it goes on like this.",
        sep="\n",
        highlight=False,
    )
    return 0


def _settings() -> "Settings":
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    return load_settings()
