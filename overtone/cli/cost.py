"""`overtone cost`: what a load costs a month, from measured throughput and a table of prices."""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from overtone.errors import ConfigurationError

_HOURS = 730.0
_DAYS = 30.4
_GB = 1e9


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Values):
    """Throughput of one machine, and the size of what is stored."""

    cores: int = Field(ge=1)
    single_texts_per_s: float = Field(gt=0)
    batch_texts_per_s: float = Field(gt=0)
    bytes_per_post: float = Field(gt=0)


class Load(_Values):
    """What is asked of the system, besides predictions a day."""

    batch_share: float = Field(ge=0, le=1)
    peak_factor: float = Field(ge=1, le=1000)
    target_use: float = Field(gt=0, le=1)
    posts_per_day: float = Field(ge=0)
    retention_days: float = Field(gt=0)


class Node(_Values):
    """A kind of machine; `count` of them, or as many as the load needs."""

    usd_per_hour: float = Field(ge=0)
    count: int | None = Field(None, ge=0)
    least: int = Field(1, ge=1)
    cores: int = Field(1, ge=1)


class Storage(_Values):
    """Prices of a gigabyte for a month."""

    usd_per_gb_month: float = Field(ge=0)
    backup_usd_per_gb_month: float = Field(ge=0)
    least_gb: float = Field(ge=0)


class Tier(_Values):
    """A plan of the X API."""

    name: str
    posts_per_month: float = Field(ge=0)
    usd_per_month: float = Field(0.0, ge=0)
    usd_per_post: float = Field(0.0, ge=0)


class Prices(_Values):
    """The file `configs/cost.yaml`."""

    measured: Measured
    load: Load
    nodes: dict[str, Node]
    services: dict[str, float]
    storage: Storage
    x_api: tuple[Tier, ...] = Field(min_length=1)
    sensitivity: dict[str, tuple[float, ...]]

    @model_validator(mode="after")
    def _is_whole(self) -> "Prices":
        missing = {"serve", "database"} - set(self.nodes)
        unknown = set(self.sensitivity) - set(Load.model_fields)
        if missing or unknown:
            raise ValueError(f"nodes lacks {sorted(missing)}; sensitivity has {sorted(unknown)}, which is no load")
        return self


class Estimate(_Values):
    """What a load needs and costs."""

    peak_texts_per_s: float
    texts_per_s_per_core: float
    serve_nodes: int
    database_gb: float
    """At the end of the retention time, on each database node."""
    growth_gb_per_month: float
    x_tier: str
    usd_per_month: dict[str, float]
    """By item."""
    total_usd_per_month: float
    usd_per_million: float
    """Predictions, without what X is paid."""


def load_prices(path: Path) -> Prices:
    """Read the table.

    Raises:
        ConfigurationError: the file cannot be read or a value in it is wrong.
    """
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None


def with_results(prices: Prices, path: Path) -> Prices:
    """`prices` with the throughput of a benchmark's results (`benchmarks/results/latest.json`).

    Raises:
        ConfigurationError: the file cannot be read, or has no such figures.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        results = {name: float(each["value"]) for name, each in found["results"].items()}
        engine = results["engine.texts_per_s"]
        measured = prices.measured.model_copy(
            update={
                "cores": int(found["machine"]["cores"]),
                "single_texts_per_s": engine * results["serve.single.c64.ratio_to_engine"],
                "batch_texts_per_s": engine * results["serve.batch256.ratio_to_engine"],
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path}: is not a benchmark's results: {error!r}") from error
    return prices.model_copy(update={"measured": measured})


def estimate(prices: Prices, predictions_per_day: float) -> Estimate:
    """What `predictions_per_day` (posts included) need and cost.

    Raises:
        ConfigurationError: no plan of the X API in the table holds so many posts.
    """
    load, measured = prices.load, prices.measured
    # Time a text takes adds up, not throughput.
    seconds = (1 - load.batch_share) / measured.single_texts_per_s + load.batch_share / measured.batch_texts_per_s
    per_core = 1 / seconds / measured.cores
    peak = predictions_per_day / 86_400 * load.peak_factor
    serve = prices.nodes["serve"]
    count = max(serve.least, math.ceil(peak / (per_core * load.target_use * serve.cores)))
    growth = load.posts_per_day * _DAYS * measured.bytes_per_post / _GB
    kept = max(prices.storage.least_gb, growth / _DAYS * load.retention_days)
    copies = prices.nodes["database"].count or 1
    tier = _tier(prices, load.posts_per_day * _DAYS)
    counts = {name: (count if name == "serve" else node.count or node.least) for name, node in prices.nodes.items()}
    items = {name: counts[name] * node.usd_per_hour * _HOURS for name, node in prices.nodes.items()}
    items |= prices.services
    items["database_storage"] = kept * copies * prices.storage.usd_per_gb_month
    items["backups"] = 2 * kept * prices.storage.backup_usd_per_gb_month
    items["x_api"] = tier.usd_per_month + tier.usd_per_post * load.posts_per_day * _DAYS
    total = sum(items.values())
    return Estimate(
        peak_texts_per_s=peak,
        texts_per_s_per_core=per_core,
        serve_nodes=count,
        database_gb=kept,
        growth_gb_per_month=growth,
        x_tier=tier.name,
        usd_per_month=items,
        total_usd_per_month=total,
        usd_per_million=(total - items["x_api"]) / (predictions_per_day * _DAYS) * 1e6,
    )


def sensitivity(prices: Prices, predictions_per_day: float) -> list[tuple[str, float, Estimate]]:
    """The estimate with one value of the load changed at a time: its name, its value, what comes of it."""
    rows = []
    for name, values in prices.sensitivity.items():
        for value in values:
            changed = prices.model_copy(update={"load": prices.load.model_copy(update={name: value})})
            rows.append((name, value, estimate(changed, predictions_per_day)))
    volumes = (predictions_per_day * factor for factor in (0.1, 10.0))
    return rows + [("predictions_per_day", volume, estimate(prices, volume)) for volume in volumes]


def show_cost(prices: Prices, predictions_per_day: float, console: Console, *, as_json: bool) -> int:
    """Print the estimate and how it changes with the load; 0."""
    found = estimate(prices, predictions_per_day)
    rows = sensitivity(prices, predictions_per_day)
    if as_json:
        changes = [{"name": name, "value": value, **each.model_dump()} for name, value, each in rows]
        console.print_json(json.dumps({**found.model_dump(), "sensitivity": changes}))
        return 0
    console.print(
        f"{predictions_per_day:,.0f} predictions a day: {found.peak_texts_per_s:,.0f} a second at the peak, "
        f"{found.texts_per_s_per_core:,.0f} a core, {found.serve_nodes} serving nodes. The database grows by "
        f"{found.growth_gb_per_month:,.1f} GB a month, to {found.database_gb:,.0f} GB. X API: {found.x_tier}.",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("item", "$ a month")
    for name, dollars in found.usd_per_month.items():
        table.add_row(name.replace("_", " "), f"{dollars:,.0f}")
    table.add_row("[bold]total[/]", f"[bold]{found.total_usd_per_month:,.0f}[/]")
    table.add_row("a million predictions, without X", f"{found.usd_per_million:,.2f}")
    console.print(table)
    changed = _table("if", "were", "serving nodes", "$ a month")
    for name, value, each in rows:
        changed.add_row(
            name.replace("_", " "), f"{value:,g}", str(each.serve_nodes), f"{each.total_usd_per_month:,.0f}"
        )
    console.print(changed)
    return 0


def _tier(prices: Prices, posts_per_month: float) -> Tier:
    for tier in prices.x_api:
        if posts_per_month <= tier.posts_per_month:
            return tier
    most = max(tier.posts_per_month for tier in prices.x_api)
    raise ConfigurationError(
        f"{posts_per_month:,.0f} posts a month: {most:,.0f} are the most of any plan in the table."
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
