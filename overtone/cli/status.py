"""`overtone status`: what runs, where, and how it goes."""

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from overtone.cli.cleanup import embedded_postgres
from overtone.cli.durations import in_words
from overtone.cli.rates import RateMeter, Rates
from overtone.cli.state import PartRecord, RunFolder, RunState
from overtone.cli.supervisor import sign_in_link
from overtone.db.database import Database
from overtone.db.predictions import Stats, stats
from overtone.errors import OvertoneError, UnavailableError
from overtone.settings import Settings

_RATE_WINDOW_S = 2.0


@dataclass(frozen=True, slots=True)
class Status:
    """One look at the stack."""

    state: RunState | None
    is_running: bool
    stats: Stats | None = None
    rates: Rates | None = None
    model_version: str | None = None
    link: str | None = None


def status(settings: Settings, console: Console, *, as_json: bool, with_link: bool) -> int:
    """Show the stack of this home; 0 when it is up and ready.

    Raises:
        UnavailableError: it is not.
    """
    found = look(settings, with_link=with_link)
    if as_json:
        console.print_json(json.dumps(as_plain(found), default=str))
    else:
        _show(found, settings, console)
    if found.state is None or not found.is_running:
        raise UnavailableError(f"Overtone does not run in {settings.home}. `overtone up` starts it.")
    if found.state.phase != "ready" or found.model_version is None:
        raise UnavailableError(f"Overtone is {found.state.phase}, and the API is not ready.")
    return 0


def look(settings: Settings, *, with_link: bool = False) -> Status:
    """Ask everything once; it takes two seconds to measure rates."""
    state = RunFolder(settings.home).load()
    if state is None or state.supervisor.alive() is None:
        return Status(state, is_running=False)
    link = link_for(settings, state) if with_link else None
    return Status(state, True, _stats(settings), _rates(settings), served_version(settings), link)


def link_for(settings: Settings, state: RunState) -> str:
    """A fresh sign-in link for the page of the running stack."""
    return asyncio.run(sign_in_link(database_url(settings), state.addresses.get("API", settings.api_url)))


def database_url(settings: Settings) -> str:
    """The database of this home: the one named by DATABASE_URL, or the embedded one."""
    return settings.database_url.get_secret_value() if settings.database_url else embedded_postgres(settings.home).url


def served_version(settings: Settings) -> str | None:
    """The version that the API says it serves; None unless it is ready."""
    try:
        answer = httpx.get(f"{settings.api_url}/ready", timeout=5.0, trust_env=False)
        return str(answer.json()["model_version"]) if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def as_plain(found: Status) -> dict[str, Any]:
    """`found` for JSON."""
    state = found.state
    plain: dict[str, Any] = {"running": found.is_running, "phase": state.phase if state and found.is_running else None}
    if state is None or not found.is_running:
        return plain
    plain |= {
        "run_id": state.run_id,
        "pid": state.supervisor.pid,
        "uptime_s": round(time.time() - state.started_at, 1),
        "source": state.source,
        "addresses": state.addresses,
        "parts": {part.name: _plain_part(part) for part in state.parts},
        "model_version": found.model_version,
        "rates": asdict(found.rates) if found.rates else None,
    }
    if found.stats:
        plain |= {"posts": found.stats.posts, "predictions": found.stats.predictions, "labels": found.stats.labels}
    if found.link:
        plain["link"] = found.link
    return plain


def _plain_part(part: PartRecord) -> dict[str, Any]:
    pid = part.process.pid if part.process else None
    return {"address": part.address, "pid": pid, "alive": _is_alive(part)}


def _is_alive(part: PartRecord) -> bool | None:
    """Whether its process lives; None for a part that is run by Ray."""
    return None if part.process is None else part.process.alive() is not None


def _stats(settings: Settings) -> Stats | None:
    async def ask() -> Stats:
        db = await Database.open(database_url(settings), max_size=1, application_name="overtone-cli")
        try:
            return await stats(db, minutes=2, newest=1)
        finally:
            await db.close()

    try:
        return asyncio.run(ask())
    except OvertoneError:
        return None


def _rates(settings: Settings) -> Rates | None:
    meter = RateMeter(settings.api_url)
    try:
        meter.look()
        time.sleep(_RATE_WINDOW_S)
        return meter.look()
    finally:
        meter.close()


def _show(found: Status, settings: Settings, console: Console) -> None:
    state = found.state
    if state is None or not found.is_running:
        return
    table = Table(box=None, padding=(0, 2), show_header=True, header_style="dim")
    for column in ("part", "state", "pid", "where"):
        table.add_column(column)
    for part in state.parts:
        alive = _is_alive(part)
        shown = "[red]down[/]" if alive is False else "[green]up[/]"
        table.add_row(part.name, shown, str(part.process.pid) if part.process else "", escape(part.address))
    console.print(f"Overtone is {state.phase}, up {in_words(time.time() - state.started_at)}, in {settings.home}")
    console.print(table)
    if found.stats:
        labels = ", ".join(f"{count:,} {label}" for label, count in found.stats.labels.items())
        console.print(
            f"\n  {found.stats.posts:,} posts and {found.stats.predictions:,} predictions stored: {labels}",
            highlight=False,
        )
    if found.rates:
        latency = "" if found.rates.p50_ms is None else f", p50 of a prediction request {found.rates.p50_ms:.0f} ms"
        console.print(
            f"  {found.rates.posts_per_s:.1f} posts/s, {found.rates.predictions_per_s:.1f} predictions/s{latency}",
            highlight=False,
        )
    console.print(f"  model {found.model_version or 'not ready'}, posts from {escape(state.source)}", highlight=False)
    for title, address in state.addresses.items():
        console.print(f"  {title:<9} {escape(address)}", highlight=False, soft_wrap=True)
    if found.link:
        console.print(f"  {'Page':<9} {escape(found.link)}", highlight=False, soft_wrap=True)
