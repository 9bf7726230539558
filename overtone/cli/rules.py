"""`overtone rules`: by which rules posts come from X."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ingest.api import XApi
    from ingest.options import RuleOption
    from ingest.simulator.matching import Subject
    from overtone.settings import Settings

T = TypeVar("T")

app = typer.Typer(help="The rules of the stream: what X holds, and what the options want.", no_args_is_help=True)

Files = Annotated[
    list[Path] | None,
    typer.Option("--ingest", metavar="FILE", help="YAML options of the ingestion; may be repeated, a later file wins."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would change; X checks it and keeps nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command("list")
def list_rules(ingest: Files = None, as_json: AsJson = False) -> int:
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


@app.command("diff")
def diff(
    ingest: Files = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if there is a difference.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show what `apply` would change: `+` added, `-` deleted, `?` held by X and not in the options."""
    from ingest.api import plan_rules

    wanted = _wanted(ingest)
    held = _with_api(lambda api: api.rules())
    to_add, to_delete, unknown = plan_rules(wanted, held)
    by_id = {rule["id"]: rule for rule in held}
    changes = [("-", by_id[one].get("tag", ""), by_id[one]["value"]) for one in to_delete]
    changes += [("+", rule.tag, rule.value) for rule in to_add]
    changes += [("?", by_id[one].get("tag", ""), by_id[one]["value"]) for one in unknown]
    if as_json:
        shown = [{"change": sign, "tag": tag, "value": value} for sign, tag, value in changes]
        Console().print_json(json.dumps(shown))
    else:
        for sign, tag, value in changes:
            typer.echo(f"{sign} {tag}: {value}")
        if not changes:
            typer.echo("X holds the rules of the options, and no others.")
    return 1 if exit_code and changes else 0


@app.command("apply")
def apply(
    ingest: Files = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete rules that the options do not have, too.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Make X hold the rules of the options."""
    return _change(_wanted(ingest), prunes=prune, dry_run=dry_run, as_json=as_json)


@app.command("add")
def add(
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Name of the rule.")],
    value: Annotated[str, typer.Argument(metavar="VALUE", help="What it matches.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Add a rule at X, in place of one with the same tag."""
    from ingest.options import RuleOption

    return _change([RuleOption(tag=tag, value=value)], prunes=False, dry_run=dry_run, as_json=as_json)


@app.command("remove")
def remove(
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


@app.command("test")
def try_out(
    ingest: Files = None,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", help="Try this value instead of the options' rules; may be repeated.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="Try it on this text; may be repeated.")] = None,
    posts: Annotated[Path | None, typer.Option("--posts", help="Try it on a file: .jsonl, .tsv, .csv.")] = None,
    stored: Annotated[int, typer.Option(min=1, max=100_000, help="Without text or file: on so many stored posts.")] = (
        1_000
    ),
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask X whether it takes the rules.")] = False,
    as_json: AsJson = False,
) -> int:
    """Try rules before they cost anything: how many posts each matches, and whether X would take it.

    Exits with 1 if X refuses one.
    """
    from ingest.options import RuleOption
    from ingest.trial import try_rules

    rules = [RuleOption(tag=f"rule {number}", value=value) for number, value in enumerate(rule or (), start=1)]
    wanted = rules or list(_wanted(ingest))
    subjects = _subjects(text, posts, stored)
    trials = try_rules(wanted, subjects)
    refused = {} if offline else _with_api(lambda api: api.refused_rules(wanted))
    shown = [{**asdict(trial), "of": len(subjects), "refused": refused.get(trial.tag)} for trial in trials]
    if as_json:
        Console().print_json(json.dumps(shown))
        return 1 if refused else 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("tag", "value", "matches", "X"):
        table.add_column(column)
    for one in shown:
        matched = f"{one['matched']} of {one['of']}" if one["matched"] is not None else f"unknown here: {one['note']}"
        verdict = one["refused"] or ("not asked" if offline else "takes it")
        table.add_row(*(escape(str(cell)) for cell in (one["tag"], one["value"], matched, verdict)))
    Console().print(table)
    return 1 if refused else 0


def _subjects(texts: list[str] | None, file: Path | None, stored: int) -> "list[Subject]":
    from ingest.posts import FilePosts
    from ingest.trial import subject_of
    from overtone.cli.database import with_database
    from overtone.db.posts import newest_posts

    if file is not None:
        source = FilePosts(file)
        texts = [source.draft(number).text for number in range(len(source))]
    if texts is not None:
        return [subject_of(number, text) for number, text in enumerate(texts)]
    rows = with_database(_settings(), lambda db: newest_posts(db, stored))
    return [subject_of(number, text, payload) for number, text, payload in rows]


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
