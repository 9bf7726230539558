"""What the status of an object says: ready, failed, or not yet. Pure: from a document to a verdict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kuberay.build import Document

APPLICATION = "overtone"


@dataclass(frozen=True, slots=True)
class State:
    """What is known of an object."""

    kind: str
    name: str
    ready: bool
    failed: bool
    message: str
    """For people: how far it is, or why it failed."""


def state_of(document: Document) -> State:
    """The state of `document`; what has no status worth waiting for is ready."""
    judge = _JUDGES.get(document["kind"])
    ready, failed, message = judge(document) if judge else (True, False, "there")
    return State(document["kind"], document["metadata"]["name"], ready, failed, message)


def active_cluster(service: Document) -> str | None:
    """The name of the RayCluster that a RayService sends requests to."""
    return (_status(service).get("activeServiceStatus") or {}).get("rayClusterName") or None


def pending_cluster(service: Document) -> str | None:
    """The name of the RayCluster that is to take over, None if there is none."""
    return (_status(service).get("pendingServiceStatus") or {}).get("rayClusterName") or None


def is_waited_for(document: Document) -> bool:
    """Whether a deployment is not done before this is ready."""
    return document["kind"] in _JUDGES


Verdict = tuple[bool, bool, str]


def _ray_service(document: Document) -> Verdict:
    status = _status(document)
    if not _is_seen(document):
        return False, False, "the operator has not seen it yet"
    conditions = _conditions(document)
    if document["spec"].get("suspend"):
        is_done = conditions.get("Suspended", {}).get("status") == "True"
        return is_done, False, "suspended" if is_done else "suspending"
    active = status.get("activeServiceStatus") or {}
    pending = status.get("pendingServiceStatus") or {}
    judged = pending if pending.get("rayClusterName") else active
    application = (judged.get("applicationStatuses") or {}).get(APPLICATION) or {}
    state = str(application.get("status") or "not deployed")
    if state == "DEPLOY_FAILED":
        return False, True, f"Serve: {application.get('message') or state}"
    sick = [
        f"{name}: {each.get('message') or each.get('status')}"
        for name, each in (application.get("serveDeploymentStatuses") or {}).items()
        if each.get("status") == "UNHEALTHY"
    ]
    if state == "UNHEALTHY" or sick:
        return False, True, "Serve: " + ("; ".join(sick) or str(application.get("message") or state))
    is_ready = conditions.get("Ready", {}).get("status") == "True" and state == "RUNNING" and judged is active
    endpoints = status.get("numServeEndpoints", 0)
    return is_ready, False, f"{state}, {endpoints} endpoints on {judged.get('rayClusterName') or 'no cluster yet'}"


def _job(document: Document) -> Verdict:
    conditions = _conditions(document)
    if conditions.get("Failed", {}).get("status") == "True":
        return False, True, conditions["Failed"].get("message") or "failed"
    done = conditions.get("Complete", {}).get("status") == "True"
    return done, False, "done" if done else f"{_status(document).get('failed', 0)} tries failed"


def _ray_job(document: Document) -> Verdict:
    status = _status(document)
    state = status.get("jobStatus") or status.get("jobDeploymentStatus") or "not started"
    failed = state in {"FAILED", "STOPPED"} or status.get("jobDeploymentStatus") in {"Failed", "ValidationFailed"}
    return state == "SUCCEEDED", failed, f"{state} {status.get('message') or ''}".strip()


def _replicated(document: Document) -> Verdict:
    wanted, ready = document["spec"].get("replicas", 1), _status(document).get("readyReplicas", 0)
    return _is_seen(document) and ready >= wanted, False, f"{ready} of {wanted} pods ready"


def _postgres(document: Document) -> Verdict:
    wanted, ready = document["spec"].get("instances", 1), _status(document).get("readyInstances", 0)
    return ready >= wanted, False, f"{ready} of {wanted} instances ready; {_status(document).get('phase') or 'waiting'}"


def _status(document: Document) -> Mapping[str, Any]:
    return document.get("status") or {}


def _is_seen(document: Document) -> bool:
    generation = document["metadata"].get("generation", 0)
    return bool(_status(document).get("observedGeneration", -1) >= generation)


def _conditions(document: Document) -> dict[str, Mapping[str, Any]]:
    return {each["type"]: each for each in _status(document).get("conditions") or []}


_JUDGES: Mapping[str, Callable[[Document], Verdict]] = {
    "RayService": _ray_service,
    "RayJob": _ray_job,
    "Job": _job,
    "Deployment": _replicated,
    "StatefulSet": _replicated,
    "Cluster": _postgres,
}
