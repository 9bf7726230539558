"""What `overtone k8s` does to a cluster: deploy, scale, roll out, roll back, train, suspend, delete."""

import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import yaml

from kuberay.api import KubeApi
from kuberay.build import Document
from kuberay.rules import problems
from kuberay.states import State, active_cluster, is_waited_for, pending_cluster, state_of
from overtone.errors import (
    ClusterConflictError,
    ClusterError,
    ClusterTimeoutError,
    ManifestError,
    NotFoundError,
    OvertoneError,
    RolloutError,
)

RAY = "ray.io/v1"
HISTORY = "overtone/before-rollout"
"""Annotation of the RayService: what the last rollout replaced, as JSON."""

_CONFLICT_TRIES = 8
_LOOKS = 8
_KEPT = {"Namespace", "PersistentVolumeClaim", "PriorityClass", "Cluster", "ObjectStore"}
"""What `delete` leaves: data, and what others may use."""
_ORDER = ("Namespace", "PriorityClass", "ServiceAccount", "Role", "SecretStore", "ExternalSecret", "ConfigMap")

Patch = dict[str, Any]

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

    def __init__(self, api: KubeApi, *, namespace: str = "overtone", name: str = "overtone") -> None:
        self._api = api
        self._namespace = namespace
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

    def roll_bundle(self, bundle: str | None, patience: Patience, seen: Seen, *, api_key: str | None) -> bool:
        """Serve the bundle in the folder `bundle` (None: the default one); whether replicas were asked, by `api_key`.

        Raises:
            RolloutError: it failed; what was served before is served again.
            ClusterTimeoutError: it was not seen to succeed in time; what was served before is ordered again.
        """
        wanted = 0

        def change(service: Document) -> Patch:
            nonlocal wanted
            config = yaml.safe_load(service["spec"]["serveConfigV2"])
            live = config["applications"][0]["deployments"][0].setdefault("user_config", {})
            wanted = int(live.get("revision") or 0) + 1
            live.update(bundle=bundle, challenger=None, shadow=0.0, canary=0.0, revision=wanted)
            return {"spec": {"serveConfigV2": yaml.safe_dump(config, sort_keys=False)}} | _remember(service)

        before = self.service()
        self._change(change)
        try:
            self._settle(patience, seen)
            if api_key:
                self._require_served(wanted, bundle, api_key, time.monotonic() + patience.timeout_s, seen)
        except (RolloutError, ClusterTimeoutError) as error:
            self._put_back(before, patience, seen, error)
        return bool(api_key)

    def roll_cluster(self, image: str | None, patience: Patience, seen: Seen, *, force: bool = False) -> None:
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
            cluster = _with_image(service["spec"]["rayClusterConfig"], image) if image else {}
            # A marker in the head's annotations makes it another cluster even where nothing else differs.
            cluster.setdefault("headGroupSpec", deepcopy(service["spec"]["rayClusterConfig"]["headGroupSpec"]))
            labels = cluster["headGroupSpec"]["template"].setdefault("metadata", {}).setdefault("annotations", {})
            labels["overtone/rollout"] = service["metadata"]["resourceVersion"]
            spec = {"upgradeStrategy": {"type": "NewCluster"}, "rayClusterConfig": cluster}
            return {"spec": spec} | _remember(service)

        self._change(change)
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
        kept = (service["metadata"].get("annotations") or {}).get(HISTORY)
        if not kept:
            raise NotFoundError("There is no rollout to take back.")
        past = json.loads(kept)
        if past["image"] != _image(service):
            self.roll_cluster(past["image"], patience, seen)
        if past["serveConfigV2"] != service["spec"]["serveConfigV2"]:
            self._change(
                lambda now: {"spec": {"serveConfigV2": _renumbered(past["serveConfigV2"], now)}} | _remember(service)
            )
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
        sent = _with_live_bundle(document, before) if document["kind"] == "RayService" and before else document
        try:
            after = self._api.apply(sent, dry_run=dry_run)
        except ClusterError as error:
            # A Job that ran cannot be changed: the new one takes its place.
            if document["kind"] != "Job" or before is None or "immutable" not in error.message or dry_run:
                raise
            self._api.delete(document)
            after = self._api.apply(sent)
        same = before is not None and _content(before) == _content(after)
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

    def _require_served(self, revision: int, bundle: str | None, api_key: str, deadline: float, seen: Seen) -> None:
        """Ask replicas until all that answer serve `revision`."""
        name = self._service_stub["metadata"]["name"]
        while True:
            answers = [
                self._api.ask_service(f"{name}-serve-svc:8000", self._namespace, "models", {"X-API-Key": api_key})
                for _ in range(_LOOKS)
            ]
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

    def _put_back(self, before: Document, patience: Patience, seen: Seen, error: OvertoneError) -> None:
        spec = before["spec"]
        self._change(
            lambda now: {
                "spec": {
                    "serveConfigV2": _renumbered(spec["serveConfigV2"], now),
                    "rayClusterConfig": spec["rayClusterConfig"],
                    "upgradeStrategy": {"type": "None"},
                }
            }
        )
        try:
            self._settle(patience, seen)
        except ClusterError as second:
            raise type(error)(f"{error.message} Taking it back did not end well either: {second.message}") from error
        raise type(error)(f"{error.message} What was served before is served again.") from error


def _remember(service: Document) -> Patch:
    kept = json.dumps({"serveConfigV2": service["spec"]["serveConfigV2"], "image": _image(service)})
    return {"metadata": {"annotations": {HISTORY: kept}}}


def _image(service: Document) -> str:
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return str(head["template"]["spec"]["containers"][0]["image"])


def _with_image(cluster: Document, image: str) -> Document:
    """The groups of `cluster` with `image`; those on CUDA with its variant for CUDA."""
    head, groups = deepcopy(cluster["headGroupSpec"]), deepcopy(cluster.get("workerGroupSpecs") or [])
    for group in (head, *groups):
        pod = group["template"]["spec"]
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            container["image"] = image + ("-cuda" if container["image"].endswith("-cuda") else "")
    return {"headGroupSpec": head, "workerGroupSpecs": groups}


def _renumbered(config: str, now: Document) -> str:
    """`config` with a revision above that of `now`: a canary that was taken back must be able to begin again."""
    past, present = yaml.safe_load(config), yaml.safe_load(now["spec"]["serveConfigV2"])
    live = present["applications"][0]["deployments"][0].get("user_config") or {}
    number = int(live.get("revision") or 0) + 1
    past["applications"][0]["deployments"][0].setdefault("user_config", {})["revision"] = number
    return yaml.safe_dump(past, sort_keys=False)


def _with_live_bundle(document: Document, before: Document) -> Document:
    """`document` with what `before` serves by a rollout: deploying again does not undo it."""
    if HISTORY not in (before["metadata"].get("annotations") or {}):
        return document
    sent = deepcopy(document)
    config, present = (yaml.safe_load(each["spec"]["serveConfigV2"]) for each in (sent, before))
    live = present["applications"][0]["deployments"][0].get("user_config")
    config["applications"][0]["deployments"][0]["user_config"] = live
    sent["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    return sent


def _content(document: Document) -> Document:
    """`document` less what the server and controllers write into every object."""
    metadata = document["metadata"]
    kept = {key: metadata[key] for key in ("name", "namespace", "labels", "annotations") if metadata.get(key)}
    return {key: value for key, value in document.items() if key not in {"metadata", "status"}} | {"metadata": kept}
