"""Following the registry's champion: what is remembered of it on the RayService, and what is to be done. Pure.

A champion is ordered once. What became of it stays written down until another one is promoted, so that neither a failed
rollout nor what an operator took back is ordered again by a program that asks every few minutes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from kuberay.build import Document
from kuberay.spec import annotation, before_rollout, live_options
from kuberay.states import pending_cluster, state_of
from overtone.errors import ClusterError

NOTE = "overtone/champion"
"""Annotation of the RayService: the champion that was looked at last and what became of it, a `Note` as JSON."""
WITHDRAWN = "overtone/rolled-back"
"""Annotation of the RayService: the folder of the bundle that `overtone k8s rollback` last took away."""
DEFAULT = "default"
"""What stands in `WITHDRAWN` for the bundle that no folder names."""

NoteState = Literal["started", "served", "refused", "held"]

VersionOf = Callable[[str | None], str | None]
"""The version of the bundle in a folder (None: the default one); None if it cannot be read."""


@dataclass(frozen=True, slots=True)
class Champion:
    """The bundle that the registry calls champion."""

    version: str
    folder: str
    """Where replicas find it."""


@dataclass(frozen=True, slots=True)
class Note:
    """What became of a champion."""

    version: str
    folder: str
    state: NoteState
    """`started`: ordered, and not yet seen to be served. `held`: it was not ordered."""
    at: str
    """When, ISO 8601."""
    reason: str = ""
    previous: str | None = None
    """The folder that was served before."""

    def as_annotation(self) -> str:
        """As `note_of` reads it."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done about a champion, and why."""

    action: Literal["serve", "finish", "served", "held", "waits"]
    """`finish`: it is ordered already, and whoever did so never said how it ended."""
    reason: str


def next_step(service: Document, champion: Champion, version_of: VersionOf, *, force: bool = False) -> Step:
    """What is to be done for the RayService `service` to serve `champion`; `force` orders what is held too.

    Raises:
        ClusterError: an annotation cannot be read.
    """
    note, served = note_of(service), live_options(service).get("bundle")
    if blocked := _blocked_because(service):
        return Step("waits", blocked)
    if note and note.state == "started" and served == note.folder:
        return Step("finish", f"its rollout of {note.at} was cut off")
    if served == champion.folder or version_of(served) == champion.version:
        return Step("served", "it is served")
    if not force:
        if reason := _held_because(service, note, champion, version_of):
            return Step("held", f"{reason}; --force orders it all the same")
        state = state_of(service)
        if not state.ready:
            return Step("waits", f"the RayService is not ready: {state.message}")
    return Step("serve", "it is not served yet")


def _blocked_because(service: Document) -> str:
    if service["spec"].get("suspend"):
        return "the stack is suspended"
    is_replaced = pending_cluster(service) or service["spec"].get("upgradeStrategy", {}).get("type") != "None"
    return "an image is being rolled out" if is_replaced else ""


def _held_because(service: Document, note: Note | None, champion: Champion, version_of: VersionOf) -> str:
    withdrawn = annotation(service, WITHDRAWN)
    if withdrawn and (withdrawn == champion.folder or version_of(withdrawn) == champion.version):
        return "it was rolled back"
    if note is None or note.version != champion.version:
        return ""
    if note.state == "refused":
        return f"it was tried at {note.at} and failed: {note.reason}"
    if note.state == "held":
        return note.reason
    return f"it was ordered at {note.at}, and something else since"


def note_of(service: Document) -> Note | None:
    """What is remembered of the champion that was looked at last.

    Raises:
        ClusterError: it cannot be read.
    """
    text = annotation(service, NOTE)
    try:
        return Note(**json.loads(text)) if text else None
    except (ValueError, TypeError):
        raise ClusterError(f"The annotation {NOTE} of the RayService cannot be read; remove it.") from None


def folders_in_use(service: Document) -> set[str]:
    """The folders of bundles that the RayService names: served or on trial, before its last rollout too, or taken back.

    Raises:
        ClusterError: the note cannot be read.
    """
    note, past = note_of(service), before_rollout(service)
    orders = [live_options(service), live_options({"spec": past}) if past else {}]
    named = [order.get(role) for order in orders for role in ("bundle", "challenger")]
    named += [note.folder, note.previous] if note else []
    named.append(annotation(service, WITHDRAWN))
    return {folder for folder in named if folder and folder != DEFAULT}
