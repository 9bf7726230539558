"""`overtone ingest`: what reading from X costs, what was missed, and by which rules posts come."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ingest.api import XApi
    from ingest.options import RuleOption
    from overtone.db.posts import Gap
    from overtone.settings import Settings

T = TypeVar("T")

app = typer.Typer(help="Reading from X: its cost, its gaps, its rules.", no_args_is_help=True)
rules = typer.Typer(help="The rules of the stream that X holds.", no_args_is_help=True)
app.add_typer(rules, name="rules")

Files = Annotated[
    list[Path] | None,
    typer.Option("--ingest", metavar="FILE", help="YAML options of the ingestion; may be repeated, a later file wins."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")]
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
    from overtone.db.posts import list_gaps

    listed = with_database(_settings(), lambda db: list_gaps(db, stream, limit=newest))
    shown = [_shown(gap) for gap in listed if not unrepaired or gap.state != "repaired"]
    console = Console()
    if as_json:
        console.print_json(json.dumps(shown))
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("id", "stream", "cause", "from", "lasted", "outcome", "posts found"):
        table.add_column(column)
    for one in shown:
        lasted = "" if one["seconds"] is None else f"{one['seconds']:g} s"
        table.add_row(
            *(str(one[name]) for name in ("id", "stream", "cause", "from")),
            lasted,
            one["outcome"],
            str(one["repaired_posts"]),
        )
    console.print(table)
    return 0


def _shown(gap: "Gap") -> dict[str, Any]:
    from overtone.schema import snowflake_to_datetime

    end = snowflake_to_datetime(gap.before_post_id) if gap.before_post_id else None
    outcome = {"open": "not over", "closed": "repair is due", "repaired": "repaired"}.get(gap.state, "")
    return {
        "id": gap.gap_id,
        "stream": gap.stream,
        "cause": gap.cause,
        "from": gap.started_at.isoformat(timespec="seconds"),
        "to": end.isoformat(timespec="seconds") if end else None,
        "seconds": round(max((end - gap.started_at).total_seconds(), 0.0), 1) if end else None,
        "state": gap.state,
        "outcome": outcome or ("partly repaired" if gap.repaired_posts else "not repaired"),
        "repaired_posts": gap.repaired_posts,
    }


@rules.command("list")
def rules_list(ingest: Files = None, as_json: AsJson = False) -> int:
    """Show the rules that X holds, and how they compare with those of the options."""
    wanted = {rule.tag: rule.value for rule in _wanted(ingest)}
    held = _with_api(lambda api: api.rules())
    for rule in held:
        tag = rule.get("tag")
        rule["options"] = "not there" if tag not in wanted else "same" if wanted[tag] == rule["value"] else "differs"
    missing = sorted(set(wanted) - {rule.get("tag") for rule in held})
    console = Console()
    if as_json:
        console.print_json(json.dumps({"rules": held, "missing": missing}))
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("id", "tag", "value", "in the options"):
        table.add_column(column)
    for rule in held:
        table.add_row(rule["id"], *(escape(rule.get(name, "")) for name in ("tag", "value", "options")))
    console.print(table)
    for tag in missing:
        console.print(f"X does not hold the rule {tag} of the options.", highlight=False, markup=False)
    return 0


@rules.command("add")
def rules_add(
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Name of the rule.")],
    value: Annotated[str, typer.Argument(metavar="VALUE", help="What it matches.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Add a rule at X, in place of one with the same tag; with --dry-run X only checks it."""
    from ingest.options import RuleOption

    return _change([RuleOption(tag=tag, value=value)], prunes=False, dry_run=dry_run, as_json=as_json)


@rules.command("remove")
def rules_remove(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="Tag or id.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Delete a rule at X. The ingestion adds those of its options again when it starts."""
    from overtone.errors import NotFoundError

    async def work(api: "XApi") -> dict[str, Any]:
        doomed = [one for one in await api.rules() if rule in (one["id"], one.get("tag"))]
        if not doomed:
            raise NotFoundError(f"X holds no rule with the tag or id {rule!r}.")
        await api.change_rules([], [one["id"] for one in doomed], dry_run=dry_run)
        return {"added": [], "deleted": [one["id"] for one in doomed]}

    return _tell(_with_api(work), dry_run=dry_run, as_json=as_json)


@rules.command("sync")
def rules_sync(
    ingest: Files = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete rules that the options do not have, too.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Make X hold the rules of the options; with --dry-run X only checks them."""
    return _change(_wanted(ingest), prunes=prune, dry_run=dry_run, as_json=as_json)


def _change(wanted: Sequence["RuleOption"], *, prunes: bool, dry_run: bool, as_json: bool) -> int:
    from ingest.api import plan_rules

    async def work(api: "XApi") -> dict[str, Any]:
        to_add, to_delete, unknown = plan_rules(wanted, await api.rules())
        doomed = [*to_delete, *(unknown if prunes else ())]
        await api.change_rules(to_add, doomed, dry_run=dry_run)
        return {"added": [rule.tag for rule in to_add], "deleted": doomed}

    return _tell(_with_api(work), dry_run=dry_run, as_json=as_json)


def _tell(done: dict[str, Any], *, dry_run: bool, as_json: bool) -> int:
    if as_json:
        Console().print_json(json.dumps({"dry_run": dry_run, **done}))
        return 0
    would = "Would delete" if dry_run else "Deleted"
    added, deleted = (", ".join(done[name]) or "nothing" for name in ("added", "deleted"))
    line = f"{would}: {deleted}. {'Would add' if dry_run else 'Added'}: {added}."
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _wanted(files: list[Path] | None) -> Sequence["RuleOption"]:
    from ingest.options import load_options

    return load_options(files or ()).rules


def _with_api(work: Callable[["XApi"], Awaitable[T]]) -> T:
    from ingest.api import XApi
    from overtone.errors import ConfigurationError

    settings = _settings()
    if settings.twitter_bearer_token is None:
        raise ConfigurationError("TWITTER_BEARER_TOKEN is not set: the rules are X's.")
    token = settings.twitter_bearer_token.get_secret_value()

    async def opened() -> T:
        async with XApi(settings.x_api_base_url, token) as api:
            return await work(api)

    return asyncio.run(opened())


def _settings() -> "Settings":
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    return load_settings()
