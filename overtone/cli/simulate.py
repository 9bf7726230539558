"""`overtone simulate`: the simulator of the X API by itself."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ingest.simulator.command import chosen_options, serve
from ingest.simulator.faults import KINDS
from ingest.simulator.scenario import Scenario, load_scenario
from overtone.logging import configure
from overtone.settings import Settings

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What the command line asked for; None leaves a value to the scenario."""

    port: int
    scenario: Path | None = None
    rate: float | None = None
    limit: int | None = None
    seed: int | None = None
    posts: Path | None = None


def simulate(settings: Settings, wanted: SimulateOptions, console: Console, *, only_checks: bool) -> int:
    """Serve until SIGINT or SIGTERM; with `only_checks` just say what the scenario will do.

    Raises:
        ConfigurationError: the scenario or an option is wrong, or the port is taken.
    """
    scenario = load_scenario(wanted.scenario) if wanted.scenario else Scenario()
    options = chosen_options(scenario, rate=wanted.rate, limit=wanted.limit, seed=wanted.seed, posts=wanted.posts)
    if only_checks:
        show_schedule(scenario, console)
        return 0
    configure("simulator", settings.log_level, "console")
    console.print(
        f"Point X_API_BASE_URL at http://{_HOST}:{wanted.port} and set any TWITTER_BEARER_TOKEN.",
        highlight=False,
        soft_wrap=True,
    )
    asyncio.run(serve(options, _HOST, wanted.port, scenario))
    return 0


def show_schedule(scenario: Scenario, console: Console) -> None:
    """What comes when."""
    schedule = scenario.schedule()
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("when", "fault", "amount", "effect"):
        table.add_column(column)
    moments = [(f"{moment:.1f} s", fault) for moment, fault in schedule.timed]
    for moment, fault in [*moments, *((f"post {count}", fault) for count, fault in schedule.counted)]:
        kind = KINDS[fault.kind]
        amount = f"{fault.size:g} {kind.unit}" if kind.unit else ""
        table.add_row(moment, fault.kind, amount, escape(kind.effect))
    console.print(table)
