"""`overtone keys` and `overtone audit`: who may call the API, and what administrators did."""

import asyncio
import json
import os
import pwd
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from overtone.cli.database import reachable_database
from overtone.db import keys
from overtone.db.audit import read_audit
from overtone.db.database import Database
from overtone.db.keys import SCOPES, KeyInfo, KeyLimits
from overtone.errors import ConfigurationError, NotFoundError
from overtone.settings import Settings

Result = TypeVar("Result")
_UNITS = {"requests_per_minute": "requests/min", "texts_per_minute": "texts/min", "texts_per_day": "texts/day"}
_COLOURS = {"active": "green", "expired": "yellow", "revoked": "red"}
_MAX_NAME_CHARS = 100
_LEAST_SECRET = 20


@dataclass(frozen=True, slots=True)
class NewKey:
    """What the command line asked for."""

    name: str
    scopes: tuple[str, ...]
    expires_in_s: float | None
    limits: KeyLimits


def create(settings: Settings, wanted: NewKey, console: Console, *, as_json: bool) -> int:
    """Make a key and print its secret, this once.

    Raises:
        ConfigurationError: the name or a scope is not one.
    """
    if not 0 < len(wanted.name) <= _MAX_NAME_CHARS or not wanted.name.isprintable():
        raise ConfigurationError(f"--name: 1 to {_MAX_NAME_CHARS} printable characters.")
    unknown = sorted(set(wanted.scopes) - set(SCOPES))
    if unknown or not wanted.scopes:
        raise ConfigurationError(f"--scope: {', '.join(unknown) or 'nothing'} is none of {', '.join(SCOPES)}.")
    scopes = [scope for scope in SCOPES if scope in wanted.scopes]
    ends = datetime.now(UTC) + timedelta(seconds=wanted.expires_in_s) if wanted.expires_in_s else None

    async def work(db: Database) -> tuple[str, str]:
        return await keys.create_key(db, wanted.name, scopes, expires_at=ends, limits=wanted.limits, actor=cli_actor())

    key_id, secret = _with_database(settings, work)
    if as_json:
        told = {"key_id": key_id, "name": wanted.name, "secret": secret, "scopes": scopes, "expires_at": ends}
        _print_json(console, {**told, "limits": asdict(wanted.limits)})
        return 0
    console.print(f"Made the key [bold]{key_id}[/] ({escape(wanted.name)}): {', '.join(scopes)}.", highlight=False)
    _print_secret(console, secret)
    return 0


def import_key(settings: Settings, name: str, scopes: tuple[str, ...], console: Console, *, as_json: bool) -> int:
    """Make the secret in OVERTONE_API_KEY a valid key; one that is known already is left as it is.

    Raises:
        ConfigurationError: OVERTONE_API_KEY is not set or too short, or a scope is not known.
    """
    secret = settings.overtone_api_key.get_secret_value() if settings.overtone_api_key else ""
    if len(secret) < _LEAST_SECRET:
        raise ConfigurationError(f"OVERTONE_API_KEY must be set, to {_LEAST_SECRET} characters or more.")
    unknown = sorted(set(scopes) - set(keys.SCOPES))
    if unknown:
        raise ConfigurationError(f"{', '.join(unknown)}: not one of {', '.join(keys.SCOPES)}.")
    key_id = _with_database(settings, lambda db: keys.import_key(db, name, secret, scopes))
    if as_json:
        _print_json(console, {"key_id": key_id})
        return 0
    console.print(f"The secret in OVERTONE_API_KEY is that of the key [bold]{key_id}[/].", highlight=False)
    return 0


def list_keys(settings: Settings, console: Console, *, with_ended: bool, as_json: bool) -> int:
    """Show the keys, never a secret."""
    found = _with_database(settings, lambda db: keys.list_keys(db, with_ended=with_ended))
    if as_json:
        _print_json(console, [asdict(info) for info in found])
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("key", "name", "state", "scopes", "limits", "made", "ends"):
        table.add_column(column, overflow="fold")
    for info in found:
        colour = _COLOURS[info.state]
        table.add_row(
            info.key_id,
            escape(info.name),
            f"[{colour}]{info.state}[/]",
            " ".join(info.scopes),
            _limits_in_words(info.limits),
            _when(info.created_at),
            _end_in_words(info),
        )
    console.print(table)
    return 0


def rotate(settings: Settings, key: str, console: Console, *, grace_s: float, as_json: bool) -> int:
    """Give a key, by its id or name, a new secret and print it; the old one stays good for `grace_s` seconds.

    Raises:
        NotFoundError: there is no such valid key.
    """
    home_file = settings.home / "api_key"
    home_secret = _secret_in(home_file)

    async def work(db: Database) -> tuple[str, str, bool]:
        info = await _find(db, key)
        is_home_key = await _is_of(db, home_secret, info.key_id)
        secret = await keys.rotate_key(db, info.key_id, grace_s=grace_s, actor=cli_actor())
        if secret is None:
            raise NotFoundError(f"{info.key_id} was revoked or has expired.")
        if is_home_key:
            _write_secret(home_file, secret)
        return info.key_id, secret, is_home_key

    key_id, secret, is_home_key = _with_database(settings, work)
    until = datetime.now(UTC) + timedelta(seconds=grace_s) if grace_s else None
    if as_json:
        _print_json(console, {"key_id": key_id, "secret": secret, "old_secret_until": until})
        return 0
    old = f"The old secret works until {_when(until)}." if until else "The old secret ended now, and its sessions too."
    console.print(f"The key [bold]{key_id}[/] has a new secret. {old}", highlight=False, soft_wrap=True)
    if is_home_key:
        told = (
            f"It is the key of this home and is now in {home_file}, where the ingestion finds it within"
            f" {settings.secrets_refresh_s} s."
        )
        console.print(escape(told), highlight=False, soft_wrap=True)
    _print_secret(console, secret)
    return 0


def revoke(settings: Settings, key: str, console: Console, *, is_sure: bool, as_json: bool) -> int:
    """End a key, by its id or name, and its sessions; asks first unless `is_sure`.

    Raises:
        NotFoundError: there is no such valid key.
    """
    home_secret = _secret_in(settings.home / "api_key")

    async def look(db: Database) -> tuple[KeyInfo, bool]:
        info = await _find(db, key)
        return info, await _is_of(db, home_secret, info.key_id)

    info, is_home_key = _with_database(settings, look)
    if not is_sure:
        used = " It is the key of this home: the ingestion and the command line use it." if is_home_key else ""
        typer.confirm(f"Revoke {info.key_id} ({info.name})?{used} This cannot be undone.", abort=True, err=True)
    _with_database(settings, lambda db: keys.revoke(db, info.key_id, actor=cli_actor()))
    if as_json:
        _print_json(console, {"key_id": info.key_id, "revoked": True})
    else:
        console.print(f"Revoked {info.key_id} ({escape(info.name)}). Replicas refuse it within 5 seconds.")
    return 0


def show_audit(settings: Settings, console: Console, *, newest: int, action: str | None, as_json: bool) -> int:
    """Show what administrators did, newest first."""
    found = _with_database(settings, lambda db: read_audit(db, newest=newest, action=action))
    if as_json:
        _print_json(console, [asdict(entry) for entry in found])
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("when", "who", "what", "on", "detail"):
        table.add_column(column, overflow="fold")
    for entry in found:
        detail = ", ".join(f"{name} {value}" for name, value in entry.detail.items() if value is not None)
        table.add_row(_when(entry.at), escape(entry.actor), entry.action, escape(entry.subject or ""), escape(detail))
    console.print(table)
    return 0


def cli_actor() -> str:
    """Who uses the command line, for the audit log: `cli:USER`."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"cli:{os.getuid()}"


def _with_database(settings: Settings, work: Callable[[Database], Awaitable[Result]]) -> Result:
    async def run(url: str) -> Result:
        db = await Database.open(url, max_size=1, application_name="overtone-cli")
        try:
            return await work(db)
        finally:
            await db.close()

    with reachable_database(settings) as url:
        return asyncio.run(run(url))


async def _find(db: Database, key: str) -> KeyInfo:
    """The one valid key with this id or name."""
    found = [info for info in await keys.list_keys(db) if key in {info.key_id, info.name}]
    if not found:
        raise NotFoundError(f"There is no valid key {key!r}. `overtone keys list` shows them.")
    if len(found) > 1:
        raise ConfigurationError(f"{len(found)} keys are called {key!r}: name one by its id, {found[0].key_id} ...")
    return found[0]


def _secret_in(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


async def _is_of(db: Database, secret: str | None, key_id: str) -> bool:
    """Whether `secret` is one of the key `key_id`."""
    record = await keys.find_key(db, keys.hash_key(secret)) if secret else None
    return record is not None and record.key_id == key_id


def _write_secret(file: Path, secret: str) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as written:
        written.write(f"{secret}\n")
    draft.replace(file)


def _print_secret(console: Console, secret: str) -> None:
    console.print("Its secret is shown this once; keep it where secrets are kept:\n")
    console.print(f"  {secret}\n", highlight=False, soft_wrap=True)


def _print_json(console: Console, value: object) -> None:
    console.print_json(json.dumps(value, default=lambda item: item.isoformat()))


def _limits_in_words(limits: KeyLimits) -> str:
    set_here = ((unit, getattr(limits, name)) for name, unit in _UNITS.items() if getattr(limits, name) is not None)
    return ", ".join(f"{value:,} {unit}" if value else f"any {unit}" for unit, value in set_here) or "default"


def _end_in_words(info: KeyInfo) -> str:
    ends = _when(info.revoked_at or info.expires_at)
    return f"{ends} (old secret {_when(info.old_secret_until)})" if info.old_secret_until else ends


def _when(instant: datetime | None) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if instant else "never"
