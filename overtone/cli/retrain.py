"""`overtone retrain`: whether it is time to train again, and the order for it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from overtone.settings import Settings
    from train.retrain import Decision, JobNeeds, Order
    from train.submission import RayJobs


def retrain(  # noqa: PLR0913, PLR0917 - flags of the command line
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- OPTIONS", help="Options of `python -m train`; {run} in them stands for the name of the run."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only if the policy says so; without it a run is ordered in any case.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide, and keep and submit nothing.")] = False,
    policy: Annotated[
        Path | None, typer.Option(help="Policy in YAML [default: that of configs/train/retrain.yaml].")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Job server, http://HOST:8265 [default: of the stack of this home]."),
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder that is uploaded for the job to run in, such as the repository's root.")
    ] = None,
    cpus: Annotated[float | None, typer.Option(min=0.0, help="CPUs kept for the command, beside its workers'.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label of the node to run on; may be repeated.")
    ] = None,
    every: Annotated[
        str | None, typer.Option(metavar="TIME", help="Check so often from now on, in an actor of the stack's Ray.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End that actor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> int:
    """Train again on what people said since the last run: decide, and submit the job to Ray, once.

    Exit code 0 whether a run was ordered or not: `outcome` of --json is submits, waits or busy. Two at once order one.
    """
    from overtone.cli.database import with_database
    from overtone.errors import ConfigurationError
    from train.retrain import JobNeeds, Order, load_policy, require_arguments
    from train.retrain import check as decide

    settings = _settings()
    if stop:
        return _stop(settings, as_json=as_json)
    if every and not check:
        raise ConfigurationError("--every goes with --check.")
    require_arguments(arguments or ())
    needs = JobNeeds(working_dir, cpus, _labels(label or ()))
    python = "python" if address else sys.executable
    order = Order(tuple(arguments or ()), python, load_policy(policy), is_forced=not check, is_dry_run=dry_run)
    if every:
        return _start(settings, order, needs, every, as_json=as_json)
    connect = lambda: _connect(settings, address, needs)  # noqa: E731
    decision = with_database(settings, lambda db: decide(settings, db, order, connect))
    if as_json:
        Console().print_json(json.dumps({"dry_run": dry_run, **decision.as_dict()}))
    else:
        _show(decision, Console(), is_dry_run=dry_run)
    return 0


def _show(decision: "Decision", console: Console, *, is_dry_run: bool) -> None:
    if decision.criteria:
        table = Table("criterion", "value", "limit", "met", "", box=None, padding=(0, 2), header_style="dim")
        for one in decision.criteria:
            value = "" if one.value is None else f"{one.value:g}"
            table.add_row(one.name, value, f"{one.limit:g}", "yes" if one.is_met else "no", escape(one.told))
        console.print(table)
    for reason in decision.reasons:
        console.print(f"- {escape(reason)}", highlight=False, soft_wrap=True)
    if decision.outcome == "submits":
        told = "would be submitted" if is_dry_run else "is submitted"
        console.print(f"[green]{decision.run}[/] {told}: {escape(decision.entrypoint or '')}", soft_wrap=True)
    else:
        console.print(f"No run is ordered: {decision.outcome}.", highlight=False)


def _connect(settings: "Settings", address: str | None, needs: "JobNeeds") -> "RayJobs":
    url = address or _stack_address(settings)
    from train.submission import RayJobs

    return RayJobs(url, needs)


def _stack_address(settings: "Settings") -> str:
    """Of the job server of the stack that runs in this home, for which this process then has the token.

    Raises:
        UnavailableError: none runs.
    """
    from overtone.cli.plan import ray_variables
    from overtone.cli.state import RunFolder
    from overtone.errors import UnavailableError
    from overtone.settings import set_default_environment
    from serve.environment import runtime_folder

    state = RunFolder(settings.home).load()
    if state is None or state.supervisor.alive() is None:
        raise UnavailableError(f"Nothing runs in {settings.home}: start it by `overtone up`, or give --address.")
    found = next((part.address for part in state.parts if part.name == "ray"), "")
    if not found.startswith("http"):
        raise UnavailableError("The stack runs without Ray's dashboard, which takes jobs: `overtone up --dashboard`.")
    set_default_environment(**ray_variables(settings, settings.home, runtime_folder(settings.home)))
    return found


def _start(settings: "Settings", order: "Order", needs: "JobNeeds", every: str, *, as_json: bool) -> int:
    from overtone.cli.durations import parse_duration

    seconds = parse_duration(every)
    address = _stack_address(settings)
    _connect_ray(settings)
    from train.retrainer import start_retrainer

    start_retrainer(order, address, needs, seconds)
    if as_json:
        Console().print_json(json.dumps({"every_s": seconds}))
    else:
        Console().print(f"Checks every {seconds:g} s, as long as this stack runs.", highlight=False)
    return 0


def _stop(settings: "Settings", *, as_json: bool) -> int:
    _stack_address(settings)
    _connect_ray(settings)
    from train.retrainer import stop_retrainer

    was_there = stop_retrainer()
    if as_json:
        Console().print_json(json.dumps({"stopped": was_there}))
    else:
        Console().print("Stopped." if was_there else "There was none.")
    return 0


def _connect_ray(settings: "Settings") -> None:
    import ray

    from overtone.cli.rollout import load_running

    address, _ = load_running(settings.home)
    ray.init(address=address, namespace="overtone", log_to_driver=False, configure_logging=False)


def _labels(words: Sequence[str]) -> dict[str, str]:
    from overtone.errors import ConfigurationError

    pairs = [word.partition("=") for word in words]
    if not all(key and equals and value for key, equals, value in pairs):
        raise ConfigurationError("--label is KEY=VALUE, such as pool=train-a100.")
    return {key: value for key, _, value in pairs}


def _settings() -> "Settings":
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    return load_settings()
