"""What KubeRay's operator checks in its own code, which the schema of its resources does not tell (KubeRay 1.7).

A manifest that breaks one of these is taken by Kubernetes and then refused by the operator, in an event that nobody
reads. Here it is refused before anything is sent. Beside them stand rules of Overtone's own, marked `overtone.`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from kuberay.build import Document

_NAME_LENGTHS = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 36}
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_FT_VARIABLES = {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_FT_ANNOTATION = "ray.io/ft-enabled"
_DRAIN_S = 60
"""Seconds that a replica which is taken away has to answer what it has: `drain_s` of the application."""

Spec = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule that a document breaks."""

    rule: str
    """Its name, such as `gcs-ft.redis-password`."""
    where: str
    """KIND/NAME, and the part of it."""
    message: str
    """What is wrong and what to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.rule}]"


def problems(documents: Iterable[Document], *, gates: frozenset[str] = frozenset()) -> list[Problem]:
    """Every rule that the Ray resources among `documents` break; `gates` are feature gates the operator runs with."""
    found: list[Problem] = []
    for document in documents:
        kind = document["kind"]
        if kind not in _NAME_LENGTHS:
            continue
        where = f"{kind}/{document['metadata'].get('name', '')}"
        checks = (_name, _CHECKS[kind], lambda each: _gates(each, gates))
        found += [Problem(rule, where, message) for check in checks for rule, message in check(document)]
    return found


Findings = Iterator[tuple[str, str]]


def _name(document: Document) -> Findings:
    name, longest = str(document["metadata"].get("name", "")), _NAME_LENGTHS[document["kind"]]
    if len(name) > longest:
        yield "name.length", f"the name has {len(name)} characters; {longest} are the most."
    if not _DNS_LABEL.fullmatch(name):
        yield "name.dns", "the name must be lower-case letters, digits and dashes, and begin with a letter."


def _cluster(document: Document) -> Findings:
    yield from _cluster_spec(document["spec"], document["metadata"].get("annotations") or {})
    upgrade = (document["spec"].get("upgradeStrategy") or {}).get("type")
    if upgrade not in {None, "Recreate", "None"}:
        yield "cluster.upgrade", f"upgradeStrategy.type {upgrade} is not Recreate or None."


def _service(document: Document) -> Findings:
    spec = document["spec"]
    cluster = spec.get("rayClusterConfig") or {}
    yield from _cluster_spec(cluster, document["metadata"].get("annotations") or {})
    service = (cluster.get("headGroupSpec") or {}).get("headService") or {}
    if (service.get("metadata") or {}).get("name"):
        yield "service.head-service-name", "headService.metadata.name must not be set in a RayService."
    if _auth(cluster).get("enableK8sTokenAuth"):
        yield "auth.k8s-token-owner", "authOptions.enableK8sTokenAuth is for a RayCluster of its own only."
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(cluster, strategy.get("clusterUpgradeOptions") or {})
    elif strategy.get("clusterUpgradeOptions"):
        yield "incremental.options", "clusterUpgradeOptions belong to NewClusterWithIncrementalUpgrade alone."
    if strategy.get("type") != "None":
        yield (
            "overtone.upgrade-none",
            "upgradeStrategy.type must be None: any change of the cluster would else end the training runs on it.",
        )
    yield from _serving_pods(cluster)


def _incremental(cluster: Spec, options: Spec) -> Findings:
    if not cluster.get("enableInTreeAutoscaling"):
        yield "incremental.autoscaling", "an incremental upgrade needs enableInTreeAutoscaling: true."
    if not options.get("gatewayClassName"):
        yield "incremental.gateway", "an incremental upgrade needs gatewayClassName."
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if not 0 <= surge <= 100:
        yield "incremental.surge", f"maxSurgePercent {surge} is not from 0 to 100."
    if step is None or not 0 <= step <= surge:
        yield "incremental.step", f"stepSizePercent {step} must be given and at most maxSurgePercent, {surge}."
    if (options.get("intervalSeconds") or 0) <= 0:
        yield "incremental.interval", "intervalSeconds must be above 0."


def _job(document: Document) -> Findings:
    spec = document["spec"]
    shuts_down = bool(spec.get("shutdownAfterJobFinishes"))
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("ttlSecondsAfterFinished") and not shuts_down:
        yield "job.ttl", "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true."
    if spec.get("suspend") and not shuts_down:
        yield "job.suspend", "suspend needs shutdownAfterJobFinishes: true."
    if spec.get("clusterSelector"):
        yield from _selecting_job(spec, mode)
    elif not spec.get("rayClusterSpec"):
        yield "job.cluster", "give rayClusterSpec or clusterSelector."
    if mode == "InteractiveMode" and (spec.get("backoffLimit") or 0) > 0:
        yield "job.interactive-backoff", "InteractiveMode cannot be tried again: backoffLimit must be 0."
    if (spec.get("deletionStrategy") or {}).get("deletionRules"):
        if shuts_down:
            yield "job.deletion-shutdown", "deletionRules and shutdownAfterJobFinishes exclude each other."
        if spec.get("ttlSecondsAfterFinished"):
            yield "job.deletion-ttl", "deletionRules and ttlSecondsAfterFinished exclude each other."
    cluster = spec.get("rayClusterSpec") or {}
    if cluster:
        yield from _cluster_spec(cluster, document["metadata"].get("annotations") or {})
        if _auth(cluster).get("enableK8sTokenAuth"):
            yield "auth.k8s-token-owner", "authOptions.enableK8sTokenAuth is for a RayCluster of its own only."


def _selecting_job(spec: Spec, mode: str) -> Findings:
    if spec.get("suspend"):
        yield "job.selector-suspend", "a job on a cluster of others cannot be suspended."
    if (spec.get("backoffLimit") or 0) > 0:
        yield "job.selector-backoff", "a job on a cluster of others cannot be tried again: backoffLimit must be 0."
    if mode == "SidecarMode":
        yield "job.selector-sidecar", "a job on a cluster of others cannot run in SidecarMode."


def _cron_job(document: Document) -> Findings:
    template = document["spec"].get("jobTemplate") or {}
    yield from _job({"kind": "RayJob", "metadata": document["metadata"], "spec": template})


def _cluster_spec(spec: Spec, annotations: Spec) -> Findings:
    groups = spec.get("workerGroupSpecs") or []
    parts = [("head", spec.get("headGroupSpec") or {}), *((str(g.get("groupName")), g) for g in groups)]
    for name, group in parts:
        params = group.get("rayStartParams") or {}
        both = [param for param in _RESOURCE_PARAMS if param in params]
        if group.get("resources") and both:
            yield "group.resources", f"group {name}: give `resources` or rayStartParams {', '.join(both)}, not both."
        if "labels" in params:
            yield "group.labels", f"group {name}: `labels` is a field of the group, not one of rayStartParams."
    names = [group.get("groupName") for group in groups]
    if len(set(names)) != len(names):
        yield "group.names", "two worker groups have one name."
    for group in groups:
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not 0 <= low <= high or not low <= group.get("replicas", low) <= high:
            yield "group.replicas", f"group {group.get('groupName')}: minReplicas <= replicas <= maxReplicas must hold."
    yield from _authentication(spec)
    yield from _fault_tolerance(spec, annotations)
    yield from _autoscaler(spec, parts)


def _authentication(spec: Spec) -> Findings:
    options = _auth(spec)
    wanted = [
        ("token", "2.52", options.get("mode") == "token"),
        ("k8s-token", "2.55", options.get("enableK8sTokenAuth")),
    ]
    for rule, least, is_asked in wanted:
        if is_asked and not _at_least(spec.get("rayVersion"), least):
            yield f"auth.{rule}", f"authOptions need rayVersion, {least} or later; it is {spec.get('rayVersion')}."


def _fault_tolerance(spec: Spec, annotations: Spec) -> Findings:
    options, head = spec.get("gcsFaultToleranceOptions"), spec.get("headGroupSpec") or {}
    has_param = "redis-password" in (head.get("rayStartParams") or {})
    if options is None:
        if has_param and annotations.get(_FT_ANNOTATION) != "true":
            yield "gcs-ft.param-without", "redis-password does nothing without gcsFaultToleranceOptions."
        return
    for name in sorted(_FT_VARIABLES & {each["name"] for each in _environment(head)}):
        yield "gcs-ft.environment", f"{name} on the head and gcsFaultToleranceOptions exclude each other."
    if _FT_ANNOTATION in annotations:
        yield "gcs-ft.annotation", f"the annotation {_FT_ANNOTATION} and gcsFaultToleranceOptions exclude each other."
    if has_param:
        yield "gcs-ft.param", "rayStartParams redis-password and gcsFaultToleranceOptions exclude each other."
    if options.get("backend", "redis") == "redis" and not options.get("redisAddress"):
        yield "gcs-ft.address", "gcsFaultToleranceOptions need redisAddress."


def _autoscaler(spec: Spec, parts: list[tuple[str, Any]]) -> Findings:
    options = spec.get("autoscalerOptions") or {}
    is_set_by_variable = any(each["name"] == _AUTOSCALER_V2 for each in _environment(parts[0][1]))
    if options.get("version") and is_set_by_variable:
        yield "autoscaler.both", f"give autoscalerOptions.version or {_AUTOSCALER_V2}, not both."
    # Version 2 is what Ray takes by itself since 2.47.
    default = "v2" if _at_least(spec.get("rayVersion"), "2.47") else "v1"
    if not spec.get("enableInTreeAutoscaling") or options.get("version", default) != "v2":
        return
    for name, group in parts:
        policy = _pod(group).get("restartPolicy")
        if policy not in {None, "Never"}:
            yield "autoscaler.restart", f"group {name}: autoscaler v2 needs restartPolicy Never; it is {policy}."


def _serving_pods(cluster: Spec) -> Findings:
    for group in [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]:
        name = group.get("groupName", "head")
        variables = {each["name"]: each.get("value") for each in _environment(group)}
        if (variables.get("RAY_SERVE_THROUGHPUT_OPTIMIZED"), variables.get("RAY_SERVE_ENABLE_HA_PROXY")) != ("1", "1"):
            yield (
                "overtone.haproxy",
                f"group {name}: RAY_SERVE_THROUGHPUT_OPTIMIZED and RAY_SERVE_ENABLE_HA_PROXY must both be 1, or "
                "workers never become ready.",
            )
        container = (_pod(group).get("containers") or [{}])[0]
        if group.get("groupName") and "readinessProbe" not in container:
            yield "overtone.readiness", f"group {name}: KubeRay's own readiness probe needs wget; give one."
        if not str(name).startswith("serve"):
            continue
        if _pod(group).get("terminationGracePeriodSeconds", 30) <= _DRAIN_S:
            yield "overtone.drain", f"group {name}: terminationGracePeriodSeconds must be above Serve's {_DRAIN_S} s."


def _gates(document: Document, gates: frozenset[str]) -> Findings:
    spec = document["spec"]
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    needed = {
        "RayClusterNetworkPolicy": "networkPolicy" in cluster,
        "RayClusterMTLS": "tlsOptions" in cluster,
        "RayClusterHistoryServer": "historyServerOptions" in cluster,
        "GCSFaultToleranceEmbeddedStorage": (cluster.get("gcsFaultToleranceOptions") or {}).get("backend") == "rocksdb",
        "RayCronJob": document["kind"] == "RayCronJob",
    }
    for gate, is_used in needed.items():
        if is_used and gate not in gates:
            yield f"gate.{gate}", f"the operator must run with the feature gate {gate}, which is off by itself."


def _auth(cluster: Spec) -> Spec:
    return cluster.get("authOptions") or {}


def _pod(group: Spec) -> Spec:
    return (group.get("template") or {}).get("spec") or {}


def _environment(group: Spec) -> list[Mapping[str, Any]]:
    containers = _pod(group).get("containers") or [{}]
    return list(containers[0].get("env") or [])


def _at_least(version: object, least: str) -> bool:
    try:
        return Version(str(version)) >= Version(least)
    except InvalidVersion:
        return False


_CHECKS: Mapping[str, Callable[[Document], Findings]] = {
    "RayCluster": _cluster,
    "RayService": _service,
    "RayJob": _job,
    "RayCronJob": _cron_job,
}
