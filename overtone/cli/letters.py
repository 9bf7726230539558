"""`overtone dead-letters`: look through what was put aside, try it again, or drop it."""

import json
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from overtone.db.database import Database
    from overtone.db.letters import Choice, Letter
    from overtone.settings import Settings

app = typer.Typer(help="Payloads that were put aside, with the reason.", no_args_is_help=True)

Ids = Annotated[list[int] | None, typer.Argument(metavar="ID...", help="Numbers of letters.")]
Reason = Annotated[str | None, typer.Option(help="Only those whose reason begins so.")]
OlderThan = Annotated[
    str | None, typer.Option("--older-than", metavar="TIME", help="Only those last seen longer ago, such as 7d.")
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say which ones.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command("list")
def list_letters(
    reason: Reason = None,
    older_than: OlderThan = None,
    newest: Annotated[int, typer.Option("--newest", "-n", min=1, max=100_000, help="How many.")] = 50,
    as_json: AsJson = False,
) -> int:
    """Show the letters that were seen last, without what they hold."""
    from overtone.cli.database import with_database
    from overtone.db.letters import count_letters, newest_letters

    choice = _choice(None, reason, older_than)

    async def work(db: "Database") -> tuple[list["Letter"], dict[str, int]]:
        return await newest_letters(db, choice, limit=newest), await count_letters(db, choice)

    letters, counts = with_database(_settings(), work)
    console = Console()
    if as_json:
        console.print_json(json.dumps({"letters": [_shown(one) for one in letters], "reasons": counts}))
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("id", "last seen", "attempts", "bytes", "post", "reason"):
        table.add_column(column)
    for one in letters:
        seen, post = one.last_seen_at.strftime("%Y-%m-%d %H:%M:%S"), str(one.post_id or "")
        table.add_row(str(one.letter_id), seen, str(one.attempts), str(len(one.raw)), post, one.reason)
    console.print(table)
    console.print(f"{sum(counts.values())} in all.", highlight=False)
    return 0


@app.command("show")
def show(
    letter: Annotated[int, typer.Argument(metavar="ID", help="Number of the letter.")], as_json: AsJson = False
) -> int:
    """Show one letter with what it holds, which may be a post's text."""
    from overtone.cli.database import with_database
    from overtone.db.letters import Choice, chosen_letters
    from overtone.errors import NotFoundError

    found = with_database(_settings(), lambda db: chosen_letters(db, Choice((letter,)), limit=1))
    if not found:
        raise NotFoundError(f"There is no dead letter {letter}.")
    raw, console = found[0].raw.decode("utf-8", "backslashreplace"), Console()
    if as_json:
        console.print_json(json.dumps({**_shown(found[0]), "raw": raw}))
        return 0
    for name, value in _shown(found[0]).items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    console.print(raw, highlight=False, markup=False, soft_wrap=True)
    return 0


@app.command("retry")
def retry(
    letters: Ids = None,
    reason: Reason = None,
    older_than: OlderThan = None,
    everything: All = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Store, or have classified, what was put aside; a letter that succeeds is gone, another counts an attempt."""
    from ingest.letters import Fate, Retrier
    from ingest.predict import client_for
    from overtone.cli.database import with_database
    from overtone.db.letters import count_letters

    settings, choice = _settings(), _some(letters, reason, older_than, everything)
    if dry_run:
        return _tell_counts("Would retry", with_database(settings, lambda db: count_letters(db, choice)), as_json)
    fates: Counter[Fate] = Counter()

    async def work(db: "Database") -> None:
        async with client_for(settings, 60.0) as client:
            await Retrier(db, client).retry(choice, lambda _, fate: fates.update([fate]))

    with_database(settings, work)
    console = Console()
    if as_json:
        console.print_json(json.dumps({fate.value: fates[fate] for fate in Fate}))
    else:
        console.print(", ".join(f"{fates[fate]} {fate.value}" for fate in Fate), highlight=False)
    return 0


@app.command("drop")
def drop(
    letters: Ids = None,
    reason: Reason = None,
    older_than: OlderThan = None,
    everything: All = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove letters for good."""
    from overtone.cli.database import with_database
    from overtone.cli.keys import cli_actor
    from overtone.db.letters import count_letters, drop_letters

    settings, choice = _settings(), _some(letters, reason, older_than, everything)
    if dry_run:
        return _tell_counts("Would drop", with_database(settings, lambda db: count_letters(db, choice)), as_json)
    if not yes:
        typer.confirm("What these letters hold cannot be had again. Drop them?", abort=True, err=True)
    dropped = with_database(settings, lambda db: drop_letters(db, choice, actor=cli_actor()))
    if as_json:
        Console().print_json(json.dumps({"dropped": dropped}))
    else:
        Console().print(f"Dropped {dropped}.", highlight=False)
    return 0


def _tell_counts(what: str, counts: dict[str, int], as_json: bool) -> int:
    if as_json:
        Console().print_json(json.dumps({"dry_run": True, "letters": sum(counts.values()), "reasons": counts}))
        return 0
    Console().print(f"{what} {sum(counts.values())}.", highlight=False)
    for reason, count in counts.items():
        Console().print(f"  {count}  {reason}", highlight=False, markup=False)
    return 0


def _shown(letter: "Letter") -> dict[str, Any]:
    fields = asdict(letter)
    raw = fields.pop("raw")
    fields |= {name: fields[name].isoformat() for name in ("first_seen_at", "last_seen_at")}
    return {**fields, "bytes": len(raw)}


def _choice(ids: list[int] | None, reason: str | None, older_than: str | None) -> "Choice":
    from overtone.cli.durations import parse_duration
    from overtone.db.letters import Choice

    age_s = parse_duration(older_than, longest_days=3650) if older_than else None
    before = datetime.now(UTC) - timedelta(seconds=age_s) if age_s else None
    return Choice(tuple(ids) if ids else None, reason, before)


def _some(ids: list[int] | None, reason: str | None, older_than: str | None, everything: bool) -> "Choice":
    from overtone.errors import ConfigurationError

    if not (ids or reason or older_than or everything):
        raise ConfigurationError("Say which letters: their numbers, --reason, --older-than or --all.")
    return _choice(ids, reason, older_than)


def _settings() -> "Settings":
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    return load_settings()
