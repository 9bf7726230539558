"""`overtone erase` and `overtone export`: what people may ask about posts of theirs."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from overtone.cli.database import with_database
from overtone.cli.keys import cli_actor
from overtone.db.audit import record_audit
from overtone.db.database import Database
from overtone.db.erasure import everything_of
from overtone.erasure import Kind, Stored, open_eraser, require_id, stored_of
from overtone.errors import ConfigurationError, DataError
from overtone.receipts import public_key, signing_key, verify
from overtone.settings import Settings


def preview(settings: Settings, kind: Kind, number: int, console: Console, *, as_json: bool) -> int:
    """Say what an erasure would remove from the database.

    Raises:
        InvalidInputError: `number` can be nobody's id.
    """
    require_id(kind, number)
    found = with_database(settings, lambda db: stored_of(db, kind, number))
    if as_json:
        console.print_json(json.dumps({"kind": kind, "id": str(number), "would_remove": asdict(found.rows)}))
    else:
        console.print(f"Would remove {_in_words(found)}, and keep the {kind} away from then on.", highlight=False)
    return 0


def erase(
    settings: Settings, kind: Kind, number: int, console: Console, *, receipt_file: Path | None, as_json: bool
) -> int:
    """Erase a post or an author and print the receipt, or write it to `receipt_file`.

    Raises:
        InvalidInputError: `number` can be nobody's id.
        ConfigurationError: the receipt cannot be written there.
    """
    if receipt_file is not None and receipt_file.exists():
        raise ConfigurationError(f"{receipt_file}: is there already; a receipt is never written over another.")

    async def work(db: Database) -> dict[str, Any]:
        return await open_eraser(settings, db).erase(kind, number, actor=cli_actor())

    receipt = with_database(settings, work)
    if receipt_file is not None:
        receipt_file.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    if as_json or receipt_file is None:
        console.print_json(json.dumps(receipt))
    else:
        removed = ", ".join(f"{count} {name}" for name, count in receipt["body"]["removed"].items())
        console.print(f"Erased the {kind}: {removed}. The receipt is in {receipt_file}.", highlight=False)
    if any(receipt["body"]["left"].values()):
        raise DataError("Something is left, as the receipt says: erase again.")
    return 0


def check_receipt(settings: Settings, file: Path, console: Console, *, trusted: str | None, as_json: bool) -> int:
    """Say whether the receipt in `file` is whole and signed by `trusted`, or by this installation.

    Raises:
        DataError: it is not.
        ConfigurationError: the file cannot be read.
    """
    try:
        receipt = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{file}: cannot be read ({error})") from error
    except ValueError as error:
        raise DataError(f"{file}: is no erasure receipt; it is not JSON.") from error
    body = verify(receipt, trusted or public_key(signing_key(settings)))
    if as_json:
        console.print_json(json.dumps({"valid": True, "body": body}))
    else:
        console.print(
            f"The receipt is good: the {body['kind']} {body['id']} was erased by {body['done_at']}.",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def export_author(settings: Settings, number: int, output: Path | None, console: Console) -> int:
    """Write all that is stored about an author as JSON lines, one a post, to `output` or standard output.

    Raises:
        InvalidInputError: `number` can be nobody's id.
    """
    require_id("author", number)

    async def work(db: Database) -> int:
        count = 0
        with output.open("x", encoding="utf-8") if output else _Standard() as file:
            async for item in everything_of(db, number):
                file.write(json.dumps(item, default=_plain, ensure_ascii=False) + "\n")
                count += 1
        async with db.transaction() as connection:
            await record_audit(connection, cli_actor(), "author.exported", None, {"posts": count})
        return count

    try:
        count = with_database(settings, work)
    except FileExistsError as error:
        raise ConfigurationError(f"{output}: is there already.") from error
    if output is not None:
        console.print(f"Wrote {count} posts to {output}.", highlight=False)
    return 0


def confirm(kind: Kind, is_sure: bool) -> None:
    """Ask before something that cannot be undone."""
    if not is_sure:
        typer.confirm(f"Erase this {kind} from every table and file? This cannot be undone.", abort=True, err=True)


class _Standard:
    """Standard output as a file that stays open."""

    def __enter__(self) -> Any:
        return sys.stdout

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()


def _plain(value: Any) -> str:
    return str(value.isoformat())


def _in_words(found: Stored) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in asdict(found.rows).items())
