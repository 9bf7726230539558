"""`overtone backup`: make backups of the database, the bundles and the registry, and bring one back."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Backups, encrypted and checked, and the way back.", no_args_is_help=True)

Target = Annotated[str, typer.Argument(metavar="TARGET", help="Folder, or an address that fsspec knows: s3://...")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the backup, or latest.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="File with the key [default: OVERTONE_HOME/backup_key]. Keep a copy elsewhere.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command("create")
def create(target: Target, key_file: KeyFile = None, as_json: AsJson = False) -> int:
    """Make a backup; the first one makes the key."""
    from overtone import backup
    from overtone.cli.database import reachable_database
    from overtone.settings import load_settings

    settings = load_settings()
    key = backup.read_key(key_file or settings.home / "backup_key", make=True)
    started = time.monotonic()
    with reachable_database(settings) as url:
        made = backup.create(url, settings.home, target, key)
    return _tell("Made", made, time.monotonic() - started, as_json=as_json)


@app.command("list")
def list_backups(target: Target, as_json: AsJson = False) -> int:
    """Show the backups of a folder, the oldest first."""
    from overtone import backup

    listed = backup.found(target)
    if as_json:
        Console().print_json(json.dumps([asdict(one) for one in listed]))
    else:
        for one in listed:
            Console().print(f"{one.name}  {one.created_at}  {one.bytes} bytes", highlight=False)
    return 0


@app.command("verify")
def verify(target: Target, name: Name = "latest", key_file: KeyFile = None, as_json: AsJson = False) -> int:
    """Read a backup whole and check it against its key and checksum."""
    from overtone import backup
    from overtone.settings import load_settings

    key = backup.read_key(key_file or load_settings().home / "backup_key")
    started = time.monotonic()
    return _tell("Checked", backup.verify(target, name, key), time.monotonic() - started, as_json=as_json)


@app.command("restore")
def restore(
    target: Target,
    name: Name = "latest",
    key_file: KeyFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> int:
    """Replace the tables, bundles and registry by those of a backup; stop the stack first."""
    from overtone import backup
    from overtone.cli.database import reachable_database
    from overtone.settings import load_settings

    settings = load_settings()
    key = backup.read_key(key_file or settings.home / "backup_key")
    if not yes:
        typer.confirm("Replace every table and the registry by those of the backup?", abort=True, err=True)
    started = time.monotonic()
    with reachable_database(settings) as url:
        restored = backup.restore(url, settings.home, target, name, key)
    return _tell("Restored", restored, time.monotonic() - started, as_json=as_json)


def _tell(what: str, backup: object, seconds: float, *, as_json: bool) -> int:
    from overtone.backup import Backup

    assert isinstance(backup, Backup)
    if as_json:
        Console().print_json(json.dumps({**asdict(backup), "seconds": round(seconds, 2)}))
    else:
        rows = sum(backup.rows.values())
        Console().print(f"{what} {backup.name}: {rows} rows, {backup.bytes} bytes, {seconds:.1f} s.", highlight=False)
    return 0
