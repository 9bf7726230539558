"""What `overtone k8s` does to a cluster: deploy, scale, roll out, roll back, train, suspend, delete."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import httpx

from kuberay.api import KubeApi
from kuberay.build import Document
from kuberay.champion import DEFAULT, NOTE, WITHDRAWN, Champion, Note, NoteState, note_of
from kuberay.rules import problems
from kuberay.spec import (
    Patch,
    annotated,
    annotation,
    before_rollout,
    content_of,
    image_of,
    live_options,
    remembered,
    renumbered,
    with_bundle,
    with_image,
    with_live_bundle,
)
from kuberay.states import State, active_cluster, is_waited_for, pending_cluster, state_of
from overtone.errors import (
    ClusterConflictError,
    ClusterError,
    ClusterTimeoutError,
    ClusterUnavailableError,
    ManifestError,
    NotFoundError,
    OvertoneError,
    RolloutError,
    UnauthorizedError,
)

RAY = "ray.io/v1"

_CONFLICT_TRIES = 8
_LOOKS = 8
_ASK_TIMEOUT_S = 10.0
_KEPT = {"Namespace", "PersistentVolumeClaim", "PriorityClass", "Cluster", "ObjectStore"}
"""What `delete` leaves: data, and what others may use."""
_SERVED = ("serveConfigV2", "upgradeStrategy", "suspend")
"""Of the spec: what says which bundle is served."""
_ORDER = ("Namespace", "PriorityClass", "ServiceAccount", "Role", "SecretStore", "ExternalSecret", "ConfigMap")

Seen = Callable[[State], None]
"""Told of every state that is seen while something is waited for."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds."""

    timeout_s: float = 900.0
    settle_s: float = 15.0
    """How long a failure must last: what is left of an earlier state goes away by itself."""


@dataclass(frozen=True, slots=True)
class Change:
    """What applying one document did, or would do."""

    kind: str
    name: str
    action: str
    """created, changed, unchanged."""
    before: Document | None = field(default=None, repr=False)
    after: Document | None = field(default=None, repr=False)


class Stack:
    """Overtone in one namespace of one cluster."""

    def __init__(
        self,
        api: KubeApi,
        *,
        namespace: str = "overtone",
        name: str = "overtone",
        replicas_url: str | None = None,
        key_header: str = "X-API-Key",
    ) -> None:
        """`replicas_url` is where the API is asked what it serves; without one, through the Kubernetes API."""
        self._api = api
        self._namespace = namespace
        self._replicas_url = replicas_url
        self._key_header = key_header
        self._service_stub: Document = {
            "apiVersion": RAY,
            "kind": "RayService",
            "metadata": {"name": name, "namespace": namespace},
        }

    def service(self) -> Document:
        """The RayService.

        Raises:
            NotFoundError: nothing is deployed.
        """
        found = self._api.find(self._service_stub)
        if found is None:
            raise NotFoundError(f"Nothing is deployed in {self._namespace}. `overtone k8s deploy` does.")
        return found

    def apply(self, documents: Sequence[Document], *, dry_run: bool = False) -> list[Change]:
        """Apply `documents`, what others need first; a bundle that was rolled out stays.

        Raises:
            ManifestError: a document breaks a rule; nothing is sent.
            ClusterError: the cluster refused one of them; those before it are applied.
        """
        found = problems(documents)
        if found:
            raise ManifestError("\n".join(map(str, found)))
        ranks = {kind: rank for rank, kind in enumerate(_ORDER)}
        ordered = sorted(documents, key=lambda each: ranks.get(each["kind"], len(_ORDER)))
        return [self._apply(each, dry_run=dry_run) for each in ordered]

    def deploy(self, documents: Sequence[Document], patience: Patience, seen: Seen) -> list[Change]:
        """Apply `documents` and wait until all of them are ready.

        Raises:
            ClusterTimeoutError: they were not ready in time; the message says what was not.
            RolloutError: the application failed.
        """
        changes = self.apply(documents)
        self.wait([each for each in documents if is_waited_for(each)], patience, seen)
        return changes

    def wait(self, documents: Sequence[Document], patience: Patience, seen: Seen) -> None:
        """Wait until all `documents` are ready; see `deploy`."""
        deadline = time.monotonic() + patience.timeout_s
        for document in documents:
            self._wait_for(document, deadline, patience.settle_s, seen)

    def states(self) -> list[State]:
        """The states of what is deployed, and of its Ray clusters' groups."""
        service = self.service()
        found = [state_of(service)]
        for kind, version in (
            ("StatefulSet", "apps/v1"),
            ("Deployment", "apps/v1"),
            ("Job", "batch/v1"),
            ("RayJob", RAY),
        ):
            found += [state_of(each) for each in self._api.list(kind, self._namespace, version)]
        pods = self._api.list("Pod", self._namespace, "v1", selector="ray.io/cluster")
        groups: dict[str, list[bool]] = {}
        for pod in pods:
            conditions = {each["type"]: each["status"] for each in (pod.get("status") or {}).get("conditions") or []}
            group = pod["metadata"]["labels"].get("ray.io/group", "head")
            groups.setdefault(group, []).append(conditions.get("Ready") == "True")
        for group, ready in sorted(groups.items()):
            found.append(State("group", group, all(ready), False, f"{sum(ready)} of {len(ready)} pods ready"))
        return found

    def scale(self, group: str, replicas: int, *, dry_run: bool = False) -> Document:
        """Have at least `replicas` pods in a worker group, and start with as many.

        Raises:
            NotFoundError: there is no such group.
        """

        def change(service: Document) -> Patch:
            groups = deepcopy(service["spec"]["rayClusterConfig"]["workerGroupSpecs"])
            chosen = next((each for each in groups if each["groupName"] == group), None)
            if chosen is None:
                raise NotFoundError(f"{group}: not one of {', '.join(each['groupName'] for each in groups)}.")
            chosen |= {"replicas": replicas, "minReplicas": replicas}
            chosen["maxReplicas"] = max(replicas, chosen.get("maxReplicas", replicas))
            return {"spec": {"rayClusterConfig": {"workerGroupSpecs": groups}}}

        return self._change(change, dry_run=dry_run)

    def suspend(self, suspended: bool, *, dry_run: bool = False) -> Document:
        """Let go of all nodes, or take them back."""
        return self._change(lambda _: {"spec": {"suspend": suspended}}, dry_run=dry_run)

    def roll_bundle(
        self, bundle: str | None, patience: Patience, seen: Seen, *, api_key: str | None, dry_run: bool = False
    ) -> bool:
        """Serve the bundle in the folder `bundle` (None: the default one); whether replicas were asked, by `api_key`.

        Raises:
            RolloutError: it failed; what was served before is served again.
            ClusterTimeoutError: it was not seen to succeed in time; what was served before is ordered again.
        """
        before = self.service()
        wanted = self._order(bundle, dry_run=dry_run)
        if not dry_run:
            self._conclude(_Order(bundle, wanted, before), patience, seen, api_key)
        return bool(api_key)

    def roll_champion(
        self,
        champion: Champion,
        decided_on: Document,
        patience: Patience,
        seen: Seen,
        *,
        api_key: str,
        dry_run: bool = False,
    ) -> None:
        """As `roll_bundle`, and write down what becomes of `champion`; `decided_on` is the RayService as it was judged.

        Raises:
            ClusterError: what is served was changed since; nothing is ordered.
        """
        previous = live_options(decided_on).get("bundle")
        note = Note(champion.version, champion.folder, "started", _now(), previous=previous)

        def require_unchanged(service: Document) -> None:
            same = all(annotation(service, name) == annotation(decided_on, name) for name in (NOTE, WITHDRAWN))
            both = service["spec"], decided_on["spec"]
            if not same or any(both[0].get(name) != both[1].get(name) for name in _SERVED):
                raise ClusterError("What is served was changed meanwhile; nothing was ordered.")

        wanted = self._order(champion.folder, note=note, check=require_unchanged, dry_run=dry_run)
        if not dry_run:
            self._conclude(_Order(champion.folder, wanted, decided_on, note), patience, seen, api_key)

    def finish_champion(self, patience: Patience, seen: Seen, *, api_key: str) -> Note:
        """Wait for the rollout that a note says was started, as the one who began it would have.

        Raises:
            RolloutError, ClusterTimeoutError: as `roll_bundle`.
        """
        service = self.service()
        note = note_of(service)
        if note is None:
            raise NotFoundError("No rollout of a champion was started.")
        before = deepcopy(service)
        before["spec"]["serveConfigV2"] = with_bundle(service, note.previous)
        order = _Order(note.folder, int(live_options(service).get("revision") or 0), before, note)
        self._conclude(order, patience, seen, api_key)
        return note

    def note(self, champion: Champion, state: NoteState, reason: str) -> None:
        """Remember what became of a champion that was not ordered."""
        note = Note(champion.version, champion.folder, state, _now(), reason)
        self._change(lambda _: annotated({NOTE: note.as_annotation()}))

    def ask_replica(self, api_key: str) -> Document:
        """What one replica says that it serves: the answer of `GET /models`.

        Raises:
            ClusterUnavailableError: none answers.
            UnauthorizedError: it does not take the key.
        """
        headers = {self._key_header: api_key}
        if self._replicas_url is None:
            name = self._service_stub["metadata"]["name"]
            found: Document = self._api.ask_service(f"{name}-serve-svc:8000", self._namespace, "models", headers)
            return found
        url = f"{self._replicas_url.rstrip('/')}/models"
        try:
            answer = httpx.get(url, headers=headers, timeout=_ASK_TIMEOUT_S, trust_env=False)
        except httpx.HTTPError as error:
            raise ClusterUnavailableError(f"{url} does not answer: {type(error).__name__}.") from error
        if answer.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise UnauthorizedError(f"{url} does not take OVERTONE_API_KEY, or the key may not `read`.")
        if answer.status_code != httpx.codes.OK:
            raise ClusterUnavailableError(f"{url} answers with status {answer.status_code}.")
        told: Document = answer.json()
        return told

    def roll_cluster(
        self, image: str | None, patience: Patience, seen: Seen, *, force: bool = False, dry_run: bool = False
    ) -> None:
        """Replace the Ray cluster by one with `image` (None: by one of the spec as it is), without a lost request.

        Raises:
            ClusterError: training runs on the cluster, and not `force`.
            RolloutError: the new cluster failed; the old one goes on.
            ClusterTimeoutError: it did not take over in time; the old one goes on.
        """
        before = self.service()
        old = active_cluster(before)
        running = [each.name for each in self.training(old)] if old else []
        if running and not force:
            raise ClusterError(f"Training runs on {old}: {', '.join(running)}. Wait for it, or give --force to end it.")

        def change(service: Document) -> Patch:
            cluster = with_image(service["spec"]["rayClusterConfig"], image) if image else {}
            # A marker in the head's annotations makes it another cluster even where nothing else differs.
            cluster.setdefault("headGroupSpec", deepcopy(service["spec"]["rayClusterConfig"]["headGroupSpec"]))
            labels = cluster["headGroupSpec"]["template"].setdefault("metadata", {}).setdefault("annotations", {})
            labels["overtone/rollout"] = service["metadata"]["resourceVersion"]
            spec = {"upgradeStrategy": {"type": "NewCluster"}, "rayClusterConfig": cluster}
            return {"spec": spec} | remembered(service)

        self._change(change, dry_run=dry_run)
        if dry_run:
            return
        deadline = time.monotonic() + patience.timeout_s

        def has_taken_over(service: Document) -> bool:
            return active_cluster(service) != old and pending_cluster(service) is None

        try:
            self._wait_for(self._service_stub, deadline, patience.settle_s, seen, also=has_taken_over)
        except (RolloutError, ClusterTimeoutError) as error:
            self._put_back(before, patience, seen, error)
        self._change(lambda _: {"spec": {"upgradeStrategy": {"type": "None"}}})

    def roll_back(self, patience: Patience, seen: Seen) -> None:
        """Return to what the last rollout replaced; another time returns to the one of now.

        Raises:
            NotFoundError: there was no rollout.
        """
        service = self.service()
        past = before_rollout(service)
        if past is None:
            raise NotFoundError("There is no rollout to take back.")
        if past["image"] != image_of(service):
            self.roll_cluster(past["image"], patience, seen)
        if past["serveConfigV2"] != service["spec"]["serveConfigV2"]:

            def change(now: Document) -> Patch:
                left, taken = (live_options(each).get("bundle") for each in (now, {"spec": past}))
                marks = {} if left == taken else {WITHDRAWN: left or DEFAULT}
                spec = {"serveConfigV2": renumbered(past["serveConfigV2"], now)}
                return {"spec": spec} | remembered(now, marks)

            self._change(change)
            self._settle(patience, seen)

    def train(self, name: str, entrypoint: str, *, dry_run: bool = False) -> Document:
        """Submit a training run to the cluster in use, as a RayJob; returns it.

        Raises:
            ClusterError: no cluster is in use yet.
            ManifestError: the name is not one that KubeRay takes.
        """
        cluster = active_cluster(self.service())
        if cluster is None:
            raise ClusterError("No Ray cluster is in use yet; `overtone k8s wait` tells when.")
        job: Document = {
            "apiVersion": RAY,
            "kind": "RayJob",
            "metadata": {
                "name": name,
                "namespace": self._namespace,
                "labels": {"app.kubernetes.io/name": "train", "app.kubernetes.io/part-of": "overtone"},
            },
            "spec": {
                "entrypoint": entrypoint,
                "clusterSelector": {"ray.io/cluster": cluster},
                # The operator submits it by itself: no pod of its own, no image to pull.
                "submissionMode": "HTTPMode",
                "backoffLimit": 0,
                # Where torch is: only the group train-a100 has this resource.
                "entrypointResources": '{"train": 0.1}',
            },
        }
        found = problems([job])
        if found:
            raise ManifestError("\n".join(map(str, found)))
        return self._api.apply(job, dry_run=dry_run)

    def training(self, cluster: str) -> list[State]:
        """The training runs on `cluster` that have not ended."""
        jobs = self._api.list("RayJob", self._namespace, RAY)
        mine = [each for each in jobs if (each["spec"].get("clusterSelector") or {}).get("ray.io/cluster") == cluster]
        states = [state_of(each) for each in mine]
        return [each for each in states if not each.ready and not each.failed]

    def delete(self, documents: Sequence[Document], *, dry_run: bool = False) -> list[str]:
        """Delete what `documents` made, less data and what others may use; returns KIND/NAME of what was there."""
        doomed = [each for each in reversed(documents) if each["kind"] not in _KEPT]
        there = [each for each in doomed if self._api.delete(each, dry_run=dry_run)]
        return [f"{each['kind']}/{each['metadata']['name']}" for each in there]

    def pods(self, group: str) -> list[str]:
        """The names of a worker group's pods, or of the head's."""
        selector = "ray.io/node-type=head" if group == "head" else f"ray.io/group={group}"
        return [each["metadata"]["name"] for each in self._api.list("Pod", self._namespace, "v1", selector=selector)]

    def _apply(self, document: Document, *, dry_run: bool) -> Change:
        before = self._api.find(document)
        sent = with_live_bundle(document, before) if document["kind"] == "RayService" and before else document
        try:
            after = self._api.apply(sent, dry_run=dry_run)
        except ClusterError as error:
            # A Job that ran cannot be changed: the new one takes its place.
            if document["kind"] != "Job" or before is None or "immutable" not in error.message or dry_run:
                raise
            self._api.delete(document)
            after = self._api.apply(sent)
        same = before is not None and content_of(before) == content_of(after)
        action = "created" if before is None else "unchanged" if same else "changed"
        return Change(document["kind"], document["metadata"]["name"], action, before, after)

    def _change(self, change: Callable[[Document], Patch], *, dry_run: bool = False) -> Document:
        """Change the RayService as `change` says of the state it is in, however often others change it meanwhile."""
        for _ in range(_CONFLICT_TRIES - 1):
            try:
                service = self.service()
                return self._api.patch(service, change(service), dry_run=dry_run)
            except ClusterConflictError:
                continue
        service = self.service()
        return self._api.patch(service, change(service), dry_run=dry_run)

    def _settle(self, patience: Patience, seen: Seen) -> None:
        deadline = time.monotonic() + patience.timeout_s
        self._wait_for(self._service_stub, deadline, patience.settle_s, seen, must_last=True)

    def _wait_for(
        self,
        document: Document,
        deadline: float,
        settle_s: float,
        seen: Seen,
        *,
        also: Callable[[Document], bool] = lambda _: True,
        must_last: bool = False,
    ) -> None:
        """`must_last`: being ready counts only when it has lasted, as the status may be of the state before."""
        failing_since, ready_since = None, None
        name = f"{document['kind']}/{document['metadata']['name']}"
        state = State(document["kind"], document["metadata"]["name"], False, False, "not there yet")
        for current in self._api.follow(document, deadline, every_s=max(1, int(settle_s / 3))):
            state = state_of(current) if current else state
            seen(state)
            now = time.monotonic()
            ready_since = (ready_since or now) if current and state.ready and also(current) else None
            if ready_since is not None and now - ready_since >= (settle_s if must_last else 0.0):
                return
            failing_since = (failing_since or now) if state.failed else None
            if failing_since is not None and now - failing_since >= settle_s:
                raise RolloutError(f"{name}: {state.message}")
        if state.failed:
            raise RolloutError(f"{name}: {state.message}")
        raise ClusterTimeoutError(f"{name} was not ready in time: {state.message}.")

    def _order(
        self,
        bundle: str | None,
        *,
        note: Note | None = None,
        check: Callable[[Document], None] = lambda _: None,
        dry_run: bool = False,
    ) -> int:
        """Order `bundle`; the revision that replicas have when they carried it out. `check` sees what is changed."""
        wanted = 0

        def change(service: Document) -> Patch:
            nonlocal wanted
            check(service)
            wanted = int(live_options(service).get("revision") or 0) + 1
            marks: dict[str, str | None] = {NOTE: note.as_annotation()} if note else {}
            if annotation(service, WITHDRAWN) == (bundle or DEFAULT):
                marks[WITHDRAWN] = None
            return {"spec": {"serveConfigV2": with_bundle(service, bundle)}} | remembered(service, marks)

        self._change(change, dry_run=dry_run)
        return wanted

    def _conclude(self, order: "_Order", patience: Patience, seen: Seen, api_key: str | None) -> None:
        """Wait until what was ordered is served, or order what was before."""
        try:
            self._settle(patience, seen)
            if api_key:
                self._require_served(order, api_key, time.monotonic() + patience.timeout_s, seen)
        except (RolloutError, ClusterTimeoutError) as error:
            self._put_back(order.before, patience, seen, error, order=order)
        note = order.note
        if note:
            served = replace(note, state="served", at=_now())
            self._change(lambda now: annotated({NOTE: served.as_annotation()}) if note_of(now) == note else {})

    def _require_served(self, order: "_Order", api_key: str, deadline: float, seen: Seen) -> None:
        """Ask replicas until all that answer serve what was ordered."""
        name = self._service_stub["metadata"]["name"]
        bundle, revision = order.bundle, order.revision
        while True:
            answers = []
            # A replica that leaves, or the Kubernetes API, may be away for a moment: what counts is the deadline.
            with suppress(ClusterUnavailableError):
                answers += [self.ask_replica(api_key) for _ in range(_LOOKS)]
            for answer in answers:
                refused = answer.get("refused") or []
                if answer["revision"] == revision and bundle and answer["champion"]["folder"] != bundle and refused:
                    raise RolloutError(f"A replica refused the bundle: {refused[-1]['reason']}.")
            done = sum(each["revision"] == revision for each in answers)
            seen(State("replicas", name, done == _LOOKS, False, f"{done} of {_LOOKS} answers by revision {revision}"))
            if done == _LOOKS:
                return
            if time.monotonic() >= deadline:
                raise ClusterTimeoutError(f"Not every replica serves revision {revision}.")
            time.sleep(1.0)

    def _put_back(
        self,
        before: Document,
        patience: Patience,
        seen: Seen,
        error: OvertoneError,
        *,
        order: "_Order | None" = None,
    ) -> None:
        """Order what was before; of an `order` for a bundle, only if nobody ordered something else meanwhile."""
        spec, note = before["spec"], order.note if order else None
        refused = replace(note, state="refused", at=_now(), reason=error.message) if note else None
        marks = {NOTE: refused.as_annotation()} if refused else {}
        is_ours = True

        def change(now: Document) -> Patch:
            nonlocal is_ours
            is_ours = order is None or live_options(now).get("revision") == order.revision
            if not is_ours:
                return annotated(marks) if note and note_of(now) == note else {}
            changed: Patch = {"serveConfigV2": renumbered(spec["serveConfigV2"], now)}
            if order is None:
                changed |= {"rayClusterConfig": spec["rayClusterConfig"], "upgradeStrategy": {"type": "None"}}
            return {"spec": changed} | annotated(marks)

        self._change(change)
        if not is_ours:
            raise type(error)(f"{error.message} Something else was ordered meanwhile, and stays.") from error
        try:
            self._settle(patience, seen)
        except ClusterError as second:
            raise type(error)(f"{error.message} Taking it back did not end well either: {second.message}") from error
        raise type(error)(f"{error.message} What was served before is served again.") from error


@dataclass(frozen=True, slots=True)
class _Order:
    """A bundle that was ordered."""

    bundle: str | None
    revision: int
    before: Document
    """The RayService as it was."""
    note: Note | None = None
    """What is written down of it, if it is a champion."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
