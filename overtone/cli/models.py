"""`overtone models`: which bundles are served, and how a challenger becomes champion and back.

An order is written down in the home, so that the next start keeps it, then given to the running replicas as Serve's
`user_config`. It is done when every replica says that it carried it out; if one refuses the bundle, the order before is
given again. Then the aliases of the registry follow, where there is one.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from overtone.bundle import Bundle, load_bundle
from overtone.cli.children import Driver
from overtone.cli.exits import error_of
from overtone.cli.plan import ray_variables
from overtone.cli.rollout import Rollout, load_rollout, load_running, save_rollout
from overtone.cli.state import RunFolder
from overtone.engine import check_golden, open_engine
from overtone.errors import (
    BundleError,
    ConfigurationError,
    NotFoundError,
    OvertoneError,
    UnauthorizedError,
    UnavailableError,
)
from overtone.registry import Registry, is_in_use
from overtone.settings import Settings, environment_for
from serve.environment import runtime_folder

_ORDER_TIMEOUT_S = 240.0
_AGREE_TIMEOUT_S = 300.0
"""For all replicas, which load a bundle in turn."""
_LOOKS = 8

Change = Callable[[Rollout], Rollout]


def list_models(settings: Settings, console: Console, *, as_json: bool) -> int:
    """Show what every replica serves.

    Raises:
        BundleError: a canary was taken back, or a replica does not carry out the last order.
        UnavailableError: the API does not answer.
    """
    found = _look(settings, _LOOKS)
    if as_json:
        console.print_json(json.dumps({"rollout": asdict(load_rollout(settings.home)), "replicas": found}))
    else:
        _show(found, console)
    for replica in found:
        challenger = replica["challenger"]
        if challenger and challenger["canary"]["rollback_reason"]:
            raise BundleError(f"The canary was taken back: {challenger['canary']['rollback_reason']}.")
        if replica["refused"] and not _carries_out(replica, load_rollout(settings.home)):
            raise BundleError(f"A bundle was refused: {replica['refused'][-1]['reason']}.")
    return 0


def order(settings: Settings, change: Change, console: Console, *, is_dry_run: bool, as_json: bool) -> int:
    """Change what is served, and wait until every replica has done so.

    Raises:
        BundleError: a bundle is not fit for use; nothing is changed.
        ConfigurationError: the order makes no sense.
        UnavailableError: the replicas did not carry it out in time.
    """
    old = load_rollout(settings.home)
    new = change(old)
    is_up = _is_up(settings)
    with ExitStack() as stack:
        driver = stack.enter_context(closing(_driver(settings))) if is_up and not is_dry_run else None
        for folder in {new.champion, new.challenger} - {old.champion, old.challenger}:
            _require_fit(settings, folder, old.champion)
        if driver:
            driver.await_answer("connect", _ORDER_TIMEOUT_S)
        if not is_dry_run:
            settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_rollout(settings.home, new)
        if driver:
            _carry_out(settings, driver, old, new)
    state = "checked, nothing changed" if is_dry_run else "done" if is_up else "takes effect at the next start"
    registered = None if is_dry_run or new.champion == old.champion else _follow(settings, new, is_up=is_up)
    if as_json:
        console.print_json(json.dumps({"state": state, "rollout": asdict(new), "registry": registered}))
        return 0
    console.print(f"champion    {escape(new.champion or 'default')}", highlight=False, soft_wrap=True)
    if new.challenger:
        shares = f"shadow {new.shadow:.0%}, canary {new.canary:.0%}"
        console.print(f"challenger  {escape(new.challenger)}  {shares}", highlight=False, soft_wrap=True)
    if registered:
        console.print(f"registry    {escape(registered)}", highlight=False, soft_wrap=True)
    console.print(f"[green]{state}[/]")
    return 0


def pull(settings: Settings, name: str, console: Console, *, as_json: bool) -> int:
    """Fetch a bundle from the registry and print its folder.

    Raises:
        EnvironmentProblemError: MLflow is not installed.
        NotFoundError: the registry has no such version.
    """
    registry = _registry(settings)
    found = registry.resolve(name)
    folder = str(registry.fetch(found).path)
    if as_json:
        console.print_json(json.dumps({"folder": folder, "version": found.bundle_version, "registry": found.version}))
    else:
        console.print(escape(folder), highlight=False, soft_wrap=True)
    return 0


def prune(settings: Settings, console: Console, *, keep: int, is_dry_run: bool, as_json: bool) -> int:
    """Remove bundles that were fetched and are neither served here, nor have an alias, nor are the `keep` last ones.

    Raises:
        EnvironmentProblemError: MLflow is not installed.
        NotFoundError: there is no registry from which they could be fetched again.
    """
    registry = _registry(settings)
    rollout = load_rollout(settings.home)
    named = (rollout.champion, rollout.previous, rollout.challenger, settings.bundle)
    removed = registry.prune(keep, [Path(folder) for folder in named if folder], is_dry_run=is_dry_run)
    freed = sum(one.bytes for one in removed)
    if as_json:
        shown = [{"version": one.folder.name, "folder": str(one.folder), "bytes": one.bytes} for one in removed]
        console.print_json(json.dumps({"removed": shown, "bytes": freed, "dry_run": is_dry_run}))
        return 0
    for one in removed:
        console.print(f"{decimal(one.bytes):>10}  {escape(str(one.folder))}", highlight=False, soft_wrap=True)
    done = "would be removed" if is_dry_run else "removed"
    console.print(f"[green]{len(removed)} bundles {done}, {decimal(freed)}[/]")
    return 0


def _registry(settings: Settings) -> Registry:
    if not is_in_use(settings):
        raise NotFoundError(
            "There is no registry: set MLFLOW_TRACKING_URI, or train with `python -m train --register`."
        )
    return Registry(settings)


def _follow(settings: Settings, new: Rollout, *, is_up: bool) -> str | None:
    """Move the aliases of the registry to what is served now; what became of that, for people.

    Where nothing is served, as in a training pod, the home does not know which champion was before; the registry does.
    Serving comes first: replicas have swapped already, so a registry that is away is told and fails nothing.
    """
    if not is_in_use(settings):
        return None
    champion = _bundle(settings, new.champion).version
    previous = _bundle(settings, new.previous).version if new.has_previous else None
    try:
        registry = Registry(settings)
        before = None if is_up else registry.find("champion")
        previous = before.bundle_version if before and before.bundle_version != champion else previous
        found = registry.follow(champion, previous)
    except OvertoneError as error:
        return f"its aliases were not moved: {error.message}"
    return f"version {found.version} is the champion" if found else f"{champion} is not in it; it has no champion now"


def _require_fit(settings: Settings, folder: str | None, champion: str | None) -> None:
    """The check that replicas make too, before anything is touched."""
    bundle = _bundle(settings, folder)
    engine = open_engine(bundle, wanted=settings.engine, built=settings.tensorrt_folder)
    try:
        check_golden(bundle, engine)
    finally:
        engine.close()
    labels = _bundle(settings, champion).labels
    if bundle.labels != labels:
        raise ConfigurationError(
            f"{bundle.path}: its labels are {', '.join(bundle.labels)} and the champion's {', '.join(labels)}; "
            "callers rely on them, so start a stack of its own with BUNDLE for a bundle with other labels."
        )


def _bundle(settings: Settings, folder: str | None) -> Bundle:
    return load_bundle(Path(folder) if folder else settings.bundle)


def _is_up(settings: Settings) -> bool:
    state = RunFolder(settings.home).load()
    return state is not None and state.supervisor.alive() is not None


def _carry_out(settings: Settings, driver: Driver, old: Rollout, new: Rollout) -> None:
    try:
        _await_replicas(settings, _deploy(driver), new)
    except OvertoneError:
        # A later revision, or the replicas would take it for an order they have carried out.
        kept = replace(old, revision=new.revision + 1)
        save_rollout(settings.home, kept)
        with suppress(OvertoneError):  # the failure to tell is the first one
            _await_replicas(settings, _deploy(driver), kept)
        raise


def _driver(settings: Settings) -> Driver:
    """The process that talks to Ray. It takes seconds to start, in which bundles can be looked at."""
    address, args = load_running(settings.home)
    variables = ray_variables(settings, settings.home, runtime_folder(settings.home))
    environment = environment_for(settings, **variables)
    return Driver(address, Path(args["metrics_folder"]), logs=settings.home / "logs", environment=environment)


def _deploy(driver: Driver) -> int:
    """Have the replicas given the order in the file; how many there are."""
    driver.order("models")
    return int(driver.await_answer("models", _ORDER_TIMEOUT_S)["replicas"])


def _await_replicas(settings: Settings, replicas: int, rollout: Rollout) -> None:
    deadline = time.monotonic() + _AGREE_TIMEOUT_S
    agreed: set[str] = set()
    while len(agreed) < replicas:
        if time.monotonic() > deadline:
            raise UnavailableError(f"{len(agreed)} of {replicas} replicas carried it out in {_AGREE_TIMEOUT_S:.0f} s.")
        for found in _look(settings, 1):
            if found["revision"] != rollout.revision:
                continue
            if not _carries_out(found, rollout):
                reason = found["refused"][-1]["reason"] if found["refused"] else "it gives no reason"
                raise BundleError(f"A replica refused the bundle: {reason}. What was served before still is.")
            agreed.add(found["replica"])
        time.sleep(0.05)


def _carries_out(found: dict[str, Any], rollout: Rollout) -> bool:
    champion = rollout.champion is None or found["champion"]["folder"] == rollout.champion
    # The champion may come from another folder with the same contents.
    champion = champion or found["champion"]["version"] == load_bundle(Path(str(rollout.champion))).version
    return champion and (found["challenger"] is not None) == (rollout.challenger is not None)


def _look(settings: Settings, times: int) -> list[dict[str, Any]]:
    """What the replicas say of themselves; each look is a connection of its own, so that they take turns."""
    found: dict[str, dict[str, Any]] = {}
    headers = {settings.api_key_header: _key(settings)}
    for _ in range(times):
        try:
            answer = httpx.get(f"{settings.api_url}/models", headers=headers, timeout=10.0, trust_env=False)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{settings.api_url} does not answer.") from error
        if answer.status_code != httpx.codes.OK:
            body = answer.json()
            raise error_of(str(body.get("code")))(str(body.get("detail")))
        found[answer.json()["replica"]] = answer.json()
    return list(found.values())


def _key(settings: Settings) -> str:
    try:
        return settings.read_api_key()
    except UnauthorizedError as error:
        raise ConfigurationError("No API key: set OVERTONE_API_KEY, or start with `overtone up` once.") from error


def _show(found: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("replica", "role", "version", "canary", "shadow", "same label", "trouble"):
        table.add_column(column)
    for replica in found:
        refused = replica["refused"][-1]["reason"] if replica["refused"] else ""
        table.add_row(replica["replica"], "champion", replica["champion"]["version"], "", "", "", escape(refused))
        challenger = replica["challenger"]
        if challenger:
            canary, shadow = challenger["canary"], challenger["shadow"]
            agreement = "" if shadow["agreement"] is None else f"{shadow['agreement']:.1%} of {shadow['compared']}"
            shares = f"{canary['share']:.0%}", f"{shadow['share']:.0%}"
            trouble = escape(canary["rollback_reason"] or "")
            table.add_row("", "challenger", challenger["version"], *shares, agreement, trouble)
    console.print(table)
