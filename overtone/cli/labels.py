"""`overtone labels`: posts worth labelling out, and what people made of them back in."""

import json
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from overtone.cli.label_files import LabelFile, Labelled, Wrong
    from overtone.db.database import Database
    from overtone.db.feedback import Written
    from overtone.settings import Settings

_SHOWN_PROBLEMS = 20
_BATCH_ROWS = 1_000

app = typer.Typer(help="Labels that people give: what to label, and what they said.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command("export")
def export_posts(
    since: Annotated[str, typer.Option(metavar="TIME", help="Only posts made within this time.")] = "7d",
    limit: Annotated[
        int,
        typer.Option(
            min=1,
            max=100_000,
            help="How many of each kind: least certain, versions of the model or annotators that disagree.",
        ),
    ] = 200,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New .csv, .jsonl or .ndjson file [default: standard output].")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write the posts whose labels would teach most, with empty columns label and annotator to fill in.

    On standard output that is CSV, or JSON lines with --json; with --output, --json is about what is printed.
    """
    from overtone.cli.database import with_database
    from overtone.cli.durations import parse_duration
    from overtone.cli.label_files import create_file, write_posts
    from overtone.db.feedback import to_label

    first = datetime.now(UTC) - timedelta(seconds=parse_duration(since, longest_days=3650))
    settings = _settings()
    if output is None:
        posts = with_database(settings, lambda db: to_label(db, since=first, limit=limit))
        write_posts(sys.stdout, posts, as_json=as_json)
        return 0
    with create_file(output) as file:
        posts = with_database(settings, lambda db: to_label(db, since=first, limit=limit))
        write_posts(file, posts, as_json=output.suffix.lower() != ".csv")
    reasons = Counter(post.reason for post in posts)
    if as_json:
        Console().print_json(json.dumps({"posts": len(posts), "reasons": reasons}))
    else:
        told = "".join(f", {count} because {reason}" for reason, count in sorted(reasons.items()))
        Console().print(f"Wrote {len(posts)} posts{told}.", highlight=False)
    return 0


@app.command("import")
def import_labels(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help=".csv, .tsv, .jsonl or .ndjson with label, post_id or text, and annotator if known."
        ),
    ],
    annotator: Annotated[str, typer.Option(help="Who labelled the rows that do not say.")] = "",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Store the rows that are right.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the rows.")] = False,
    as_json: AsJson = False,
) -> int:
    """Store the labels of a file; nothing, if a row is wrong. The same file again changes nothing.

    Rows without a label are passed over. Where a row has both, post_id counts and not text.
    """
    from overtone.bundle import load_bundle
    from overtone.cli.database import with_database
    from overtone.cli.exits import exit_code
    from overtone.cli.keys import cli_actor
    from overtone.cli.label_files import read_labels
    from overtone.errors import InvalidInputError

    settings = _settings()
    found = read_labels(source, load_bundle(settings.bundle).labels, annotator)
    states: Counter[str] = Counter()

    async def work(db: "Database") -> "list[Wrong]":
        unknown, kept = await _split(db, found)
        wrong = sorted([*found.wrong, *unknown], key=lambda one: one.line)
        if not dry_run and (skip_bad or not wrong):
            lost = await _store(db, kept, cli_actor(), states)
            wrong = sorted([*wrong, *lost], key=lambda one: one.line)
        return wrong

    wrong = with_database(settings, work)
    bad_lines = len({one.line for one in wrong})
    counts = {
        "rows": found.rows,
        "unlabelled": found.unlabelled,
        "bad": bad_lines,
        **{state: states[state] for state in ("created", "changed", "unchanged")},
    }
    is_refused = bool(wrong) and not skip_bad
    if as_json:
        shown = [{"line": one.line, "field": one.field, "problem": one.problem} for one in wrong]
        Console().print_json(json.dumps({"dry_run": dry_run, **counts, "wrong": shown}))
        return exit_code(InvalidInputError()) if is_refused else 0
    told = _told(wrong)
    if is_refused:
        stored = sum(states.values())
        raise InvalidInputError(f"{bad_lines} rows are wrong; {stored or 'nothing'} stored.\n{told}")
    if wrong:
        Console(stderr=True).print(told, highlight=False, markup=False, soft_wrap=True)
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    Console().print(f"Only checked: {text}." if dry_run else f"{text}.", highlight=False)
    return 0


async def _split(db: "Database", found: "LabelFile") -> "tuple[list[Wrong], list[Labelled]]":
    """What names posts that are not stored, and the other rows."""
    from overtone.cli.label_files import Wrong
    from overtone.db.feedback import known_posts

    ids = [one.item.post_id for one in found.labelled if one.item.post_id is not None]
    known: set[int] = set()
    for start in range(0, len(ids), _BATCH_ROWS):
        known |= await known_posts(db, ids[start : start + _BATCH_ROWS])
    kept, unknown = [], []
    for one in found.labelled:
        if one.item.post_id is None or one.item.post_id in known:
            kept.append(one)
        else:
            unknown.append(Wrong(one.line, "post_id", "is not stored"))
    return unknown, kept


async def _store(db: "Database", rows: "list[Labelled]", actor: str, states: Counter[str]) -> "list[Wrong]":
    """Store `rows`, counting in `states`; what was erased in between is returned."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from overtone.cli.label_files import Wrong
    from overtone.db.feedback import write_feedback

    lost = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("storing labels", total=len(rows))
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            answers: list[Written | None] = await write_feedback(
                db, [one.item for one in batch], key_id=actor, source="import"
            )
            for one, written in zip(batch, answers, strict=True):
                if written is None:
                    lost.append(Wrong(one.line, "post_id", "is not stored"))
                else:
                    states[written.state] += 1
            progress.advance(bar, len(batch))
    return lost


def _told(wrong: "list[Wrong]") -> str:
    lines = [f"line {one.line}, {one.field}: {one.problem}" for one in wrong[:_SHOWN_PROBLEMS]]
    more = len(wrong) - _SHOWN_PROBLEMS
    return "\n".join([*lines, f"and {more} more; --json tells all"] if more > 0 else lines)


def _settings() -> "Settings":
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    return load_settings()
