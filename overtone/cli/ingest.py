"""`overtone ingest`: what reading from X costs, and what was missed."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from overtone.db.gaps import Gap
    from overtone.settings import Settings

app = typer.Typer(help="Reading from X: its cost and its gaps.", no_args_is_help=True)

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


@app.command("gaps")
def gaps(
    unrepaired: Annotated[bool, typer.Option("--unrepaired", help="Only those that are not repaired.")] = False,
    stream: Annotated[str | None, typer.Option(help="Only of this stream, such as filtered_stream.")] = None,
    newest: Annotated[int, typer.Option("--newest", "-n", min=1, max=100_000, help="How many to look at.")] = 50,
    as_json: AsJson = False,
) -> int:
    """Show the periods without a connection, newest first, and what became of each."""
    from overtone.cli.database import with_database
    from overtone.db.gaps import list_gaps

    listed = with_database(_settings(), lambda db: list_gaps(db, stream, limit=newest))
    shown = [_shown(gap) for gap in listed if not unrepaired or gap.state != "repaired"]
    console = Console()
    if as_json:
        console.print_json(json.dumps(shown))
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("id", "stream", "cause", "from", "lasted", "outcome", "by", "posts found", "why not all"):
        table.add_column(column)
    for one in shown:
        lasted = "" if one["seconds"] is None else f"{one['seconds']:g} s"
        table.add_row(
            *(str(one[name]) for name in ("id", "stream", "cause", "from")),
            lasted,
            one["outcome"],
            one["means"] or "",
            str(one["repaired_posts"]),
            escape(one["reason"] or ""),
        )
    console.print(table)
    return 0


@app.command("accept-gaps")
def accept_gaps(
    gaps: Annotated[list[int], typer.Argument(metavar="ID...", help="Numbers, as `overtone ingest gaps` shows them.")],
    reason: Annotated[str, typer.Option(help="Why they may stay as they are; it goes into the ledger.")],
    as_json: AsJson = False,
) -> int:
    """Take gaps as they are: what they lack is not fetched, and they no longer count as due."""
    from overtone.cli.database import with_database
    from overtone.cli.keys import cli_actor
    from overtone.db.gaps import accept_gaps as accept
    from overtone.errors import NotFoundError

    accepted = with_database(_settings(), lambda db: accept(db, gaps, reason, actor=cli_actor()))
    left = sorted(set(gaps) - set(accepted))
    if not accepted:
        raise NotFoundError(f"No gap with these numbers is over and not whole: {', '.join(map(str, left))}.")
    if as_json:
        Console().print_json(json.dumps({"accepted": accepted, "left": left}))
        return 0
    line = f"Accepted: {', '.join(map(str, accepted))}. Left alone: {', '.join(map(str, left)) or 'none'}."
    Console().print(line, highlight=False, markup=False)
    return 0


_OUTCOMES = {
    "open": "not over",
    "closed": "repair is due",
    "repaired": "repaired",
    "partly_repaired": "partly repaired",
    "accepted": "accepted",
}


def _shown(gap: "Gap") -> dict[str, Any]:
    from overtone.schema import snowflake_to_datetime

    end = snowflake_to_datetime(gap.before_post_id) if gap.before_post_id else None
    return {
        "id": gap.gap_id,
        "stream": gap.stream,
        "cause": gap.cause,
        "from": gap.started_at.isoformat(timespec="seconds"),
        "to": end.isoformat(timespec="seconds") if end else None,
        "seconds": round(max((end - gap.started_at).total_seconds(), 0.0), 1) if end else None,
        "state": gap.state,
        "outcome": _OUTCOMES[gap.state],
        "means": gap.means,
        "repaired_posts": gap.repaired_posts,
        "reason": gap.reason,
    }


def _settings() -> "Settings":
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    return load_settings()
