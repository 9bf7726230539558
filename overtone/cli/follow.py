"""`overtone k8s follow`: the registry's champion, served on Kubernetes.

The registry says which bundle is the champion; the RayService says which one is served, and what became of the champion
that was looked at last. A new one is copied to where replicas find it and rolled out once; see `kuberay.champion`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kuberay.champion import DEFAULT, Champion, folders_in_use, next_step, note_of
from kuberay.client import Patience, Seen, Stack
from overtone.bundle import load_bundle
from overtone.errors import (
    BundleError,
    ClusterTimeoutError,
    ConfigurationError,
    OvertoneError,
    RolloutError,
)
from overtone.logging import get_logger
from overtone.registry import Registered, Registry, is_in_use
from overtone.settings import Settings

_log = get_logger()

Watching = Callable[[], AbstractContextManager[Seen]]
"""Shows people what is waited for, from when there is something."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What following came to."""

    outcome: Literal["rolled_out", "served", "held", "waits", "none"]
    """`none`: the registry has no champion."""
    reason: str
    champion: str = ""
    """The version of its bundle."""
    registry: str = ""
    """Its number in the registry."""
    folder: str = ""
    dry_run: bool = False
    """Whether `rolled_out` is only what would be done."""


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """How to follow."""

    bundles: Path
    """Folder of bundles; replicas see it under the same path."""
    patience: Patience
    keep: int
    """How many fetched bundles that nothing refers to stay when another champion was rolled out."""
    force: bool = False
    dry_run: bool = False


def follow(settings: Settings, stack: Stack, options: FollowOptions, watching: Watching) -> Followed:
    """Serve the champion, unless it is served, or was tried already or rolled back.

    Raises:
        RolloutError: it is not fit, or replicas refused it; what was served before is.
        ClusterTimeoutError: it was not served in time; what was served before is ordered again.
        ConfigurationError: there is no registry, no key, or the folder of bundles is not here.
        UnavailableError: the registry, the API or the Kubernetes API does not answer.
    """
    try:
        found = _follow(settings, stack, options, watching)
    except (RolloutError, ClusterTimeoutError) as error:
        _log.error("champion.refused", reason=error.message)
        raise
    _log.info(
        "champion.followed",
        outcome=found.outcome,
        reason=found.reason,
        champion=found.champion,
        registry=found.registry,
        dry_run=found.dry_run,
    )
    return found


def _follow(settings: Settings, stack: Stack, options: FollowOptions, watching: Watching) -> Followed:
    if not is_in_use(settings):
        raise ConfigurationError("There is no registry to follow: set MLFLOW_TRACKING_URI.")
    key = _key(settings)
    registry = Registry(settings, bundles=options.bundles)
    registered = registry.find("champion")
    if registered is None:
        return Followed("none", f"the registry {registry.name} has no champion", dry_run=options.dry_run)
    if not registered.bundle_version:
        raise BundleError(f"Version {registered.version} of {registry.name} is no bundle of Overtone's.")
    champion = Champion(registered.bundle_version, str(registry.folder_of(registered)))
    service = stack.service()
    step = next_step(service, champion, lambda folder: _version_of(settings, folder), force=options.force)
    told = Followed(
        "waits", step.reason, champion.version, registered.version, champion.folder, dry_run=options.dry_run
    )
    note = note_of(service)
    match step.action:
        case "waits":
            return told
        case "served" | "held":
            if not options.dry_run and (note is None or note.version != champion.version):
                stack.note(champion, step.action, step.reason)
            return replace(told, outcome=step.action)
        case "finish" if note:
            if not options.dry_run:
                with watching() as seen:
                    note = stack.finish_champion(options.patience, seen, api_key=key)
            # Another may have become champion meanwhile: it is taken up the next time.
            return replace(told, outcome="rolled_out", champion=note.version, folder=note.folder)
    if not options.dry_run:
        _fetch(registry, registered, champion, stack, key, options.bundles)
    with watching() as seen:
        stack.roll_champion(champion, service, options.patience, seen, api_key=key, dry_run=options.dry_run)
    if not options.dry_run:
        _prune(registry, stack, options.keep)
    return replace(told, outcome="rolled_out")


def _prune(registry: Registry, stack: Stack, keep: int) -> None:
    """Make room for bundles to come. The rollout has succeeded, whatever becomes of this."""
    try:
        removed = registry.prune(keep, [Path(folder) for folder in folders_in_use(stack.service())])
    except (OvertoneError, OSError) as error:
        _log.warning("bundles.not_pruned", reason=str(error))
        return
    for one in removed:
        _log.info("bundle.pruned", folder=str(one.folder), bytes=one.bytes)


def _fetch(
    registry: Registry, registered: Registered, champion: Champion, stack: Stack, key: str, bundles: Path
) -> None:
    """Put the bundle where replicas find it. One that is not fit is remembered, so that it is not fetched for ever."""
    if not bundles.parent.is_dir():
        raise ConfigurationError(
            f"{bundles}: is not here. Run this where the volume of bundles is mounted: CronJob overtone-follow does."
        )
    labels = stack.ask_replica(key)["champion"]["labels"]
    try:
        bundle = registry.fetch(registered)
        if bundle.version != registered.bundle_version:
            raise BundleError(f"{bundle.path}: is {bundle.version}, and the registry says {registered.bundle_version}.")
        if list(bundle.labels) != list(labels):
            ours, theirs = (", ".join(each) for each in (bundle.labels, labels))
            raise BundleError(f"{bundle.path}: its labels are {ours} and those that are served {theirs}")
    except BundleError as error:
        stack.note(champion, "refused", error.message)
        raise RolloutError(f"{error.message}. Nothing was ordered.") from error
    _log.info("champion.fetched", champion=bundle.version, folder=str(bundle.path))


def _version_of(settings: Settings, folder: str | None) -> str | None:
    try:
        return load_bundle(Path(folder) if folder and folder != DEFAULT else settings.bundle).version
    except BundleError:
        return None


def _key(settings: Settings) -> str:
    if settings.overtone_api_key is None:
        raise ConfigurationError("Set OVERTONE_API_KEY: replicas are asked by it whether they serve the champion.")
    return settings.overtone_api_key.get_secret_value()
