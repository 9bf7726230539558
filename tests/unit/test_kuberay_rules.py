"""KubeRay's own rules: what we ship keeps all of them, and a copy that breaks one is refused for it."""

from copy import deepcopy
from typing import Any

import pytest

from kuberay.build import Document, build_overlay, overlay_names
from kuberay.rules import problems

SERVICE = next(each for each in build_overlay("production") if each["kind"] == "RayService")
CLUSTER: Document = {
    "apiVersion": "ray.io/v1",
    "kind": "RayCluster",
    "metadata": {"name": "overtone"},
    "spec": deepcopy(SERVICE["spec"]["rayClusterConfig"]),
}
JOB: Document = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "train"},
    "spec": {"entrypoint": "python -m train", "clusterSelector": {"ray.io/cluster": "overtone-x"}, "backoffLimit": 0},
}
OWN_JOB: Document = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "train"},
    "spec": {
        "entrypoint": "python -m train",
        "rayClusterSpec": CLUSTER["spec"],
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 60,
    },
}
CRON: Document = {
    "apiVersion": "ray.io/v1",
    "kind": "RayCronJob",
    "metadata": {"name": "retrain"},
    "spec": {"schedule": "0 3 * * 0", "jobTemplate": OWN_JOB["spec"]},
}
HEAD, WORKER = "spec/headGroupSpec", "spec/workerGroupSpecs/0"
OWNED = "spec/rayClusterConfig"
RULES = [
    ("name.length", CLUSTER, {"metadata/name": "a" * 54}),
    ("name.length", SERVICE, {"metadata/name": "a" * 48}),
    ("name.length", JOB, {"metadata/name": "a" * 48}),
    ("name.length", CRON, {"metadata/name": "a" * 37}),
    ("name.dns", CLUSTER, {"metadata/name": "1st"}),
    ("name.dns", SERVICE, {"metadata/name": "Over_tone"}),
    ("service.head-service-name", SERVICE, {f"{OWNED}/headGroupSpec/headService": {"metadata": {"name": "x"}}}),
    ("group.resources", CLUSTER, {f"{HEAD}/rayStartParams/num-cpus": "1"}),
    ("group.resources", CLUSTER, {f"{WORKER}/resources": {"CPU": "4"}, f"{WORKER}/rayStartParams/memory": "1"}),
    ("group.resources", CLUSTER, {f"{WORKER}/resources": {"CPU": "4"}, f"{WORKER}/rayStartParams/num-gpus": "1"}),
    ("group.resources", CLUSTER, {f"{WORKER}/resources": {"CPU": "4"}, f"{WORKER}/rayStartParams/resources": "{}"}),
    ("group.labels", CLUSTER, {f"{WORKER}/rayStartParams/labels": "pool=a"}),
    ("group.labels", CLUSTER, {f"{HEAD}/rayStartParams/labels": "pool=a"}),
    ("group.names", CLUSTER, {f"{WORKER}/groupName": "ingest"}),
    ("group.replicas", CLUSTER, {f"{WORKER}/replicas": 1}),
    ("group.replicas", CLUSTER, {f"{WORKER}/minReplicas": 99}),
    ("cluster.upgrade", CLUSTER, {"spec/upgradeStrategy": {"type": "NewCluster"}}),
    ("auth.token", CLUSTER, {"spec/rayVersion": "2.51.0"}),
    ("auth.token", CLUSTER, {"spec/rayVersion": None}),
    ("auth.k8s-token", CLUSTER, {"spec/authOptions/enableK8sTokenAuth": True, "spec/rayVersion": "2.54.0"}),
    ("auth.k8s-token-owner", SERVICE, {"spec/rayClusterConfig/authOptions/enableK8sTokenAuth": True}),
    ("auth.k8s-token-owner", OWN_JOB, {"spec/rayClusterSpec/authOptions/enableK8sTokenAuth": True}),
    ("gcs-ft.environment", CLUSTER, {f"{HEAD}/template/spec/containers/0/env/0/name": "REDIS_PASSWORD"}),
    ("gcs-ft.environment", CLUSTER, {f"{HEAD}/template/spec/containers/0/env/0/name": "RAY_REDIS_ADDRESS"}),
    ("gcs-ft.annotation", CLUSTER, {"metadata/annotations": {"ray.io/ft-enabled": "true"}}),
    ("gcs-ft.param", CLUSTER, {f"{HEAD}/rayStartParams/redis-password": "x"}),
    (
        "gcs-ft.param-without",
        CLUSTER,
        {f"{HEAD}/rayStartParams/redis-password": "x", "spec/gcsFaultToleranceOptions": None},
    ),
    ("gcs-ft.address", CLUSTER, {"spec/gcsFaultToleranceOptions/redisAddress": ""}),
    ("autoscaler.restart", CLUSTER, {f"{WORKER}/template/spec/restartPolicy": "Always"}),
    ("autoscaler.restart", CLUSTER, {f"{HEAD}/template/spec/restartPolicy": "OnFailure"}),
    ("autoscaler.restart", CLUSTER, {f"{HEAD}/template/spec/restartPolicy": "Always", "spec/autoscalerOptions": {}}),
    ("autoscaler.both", CLUSTER, {f"{HEAD}/template/spec/containers/0/env/0/name": "RAY_enable_autoscaler_v2"}),
    ("job.ttl", OWN_JOB, {"spec/shutdownAfterJobFinishes": False}),
    ("job.suspend", OWN_JOB, {"spec/shutdownAfterJobFinishes": False, "spec/suspend": True}),
    ("job.selector-suspend", JOB, {"spec/suspend": True, "spec/shutdownAfterJobFinishes": True}),
    ("job.selector-backoff", JOB, {"spec/backoffLimit": 1}),
    ("job.selector-sidecar", JOB, {"spec/submissionMode": "SidecarMode"}),
    ("job.cluster", JOB, {"spec/clusterSelector": None}),
    ("job.interactive-backoff", OWN_JOB, {"spec/submissionMode": "InteractiveMode", "spec/backoffLimit": 2}),
    ("job.deletion-shutdown", OWN_JOB, {"spec/deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf"}]}}),
    ("job.deletion-ttl", OWN_JOB, {"spec/deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf"}]}}),
    ("job.selector-backoff", CRON, {"spec/jobTemplate": JOB["spec"] | {"backoffLimit": 3}}),
    ("gate.RayClusterNetworkPolicy", CLUSTER, {"spec/networkPolicy": {"mode": "DenyAll"}}),
    ("gate.RayClusterMTLS", CLUSTER, {"spec/tlsOptions": {"enabled": True}}),
    ("gate.RayClusterHistoryServer", CLUSTER, {"spec/historyServerOptions": {}}),
    ("gate.GCSFaultToleranceEmbeddedStorage", CLUSTER, {"spec/gcsFaultToleranceOptions": {"backend": "rocksdb"}}),
    ("gate.RayCronJob", CRON, {}),
    ("overtone.upgrade-none", SERVICE, {"spec/upgradeStrategy/type": "NewCluster"}),
    ("overtone.haproxy", SERVICE, {f"{OWNED}/workerGroupSpecs/0/template/spec/containers/0/env/0/value": "0"}),
    ("overtone.readiness", SERVICE, {f"{OWNED}/workerGroupSpecs/3/template/spec/containers/0/readinessProbe": None}),
    ("overtone.drain", SERVICE, {f"{OWNED}/workerGroupSpecs/0/template/spec/terminationGracePeriodSeconds": 30}),
]
GATES = frozenset({"RayCronJob"})


def broken(document: Document, changes: dict[str, Any]) -> Document:
    """A copy of `document` with the value at each path changed; None takes it out."""
    copy = deepcopy(document)
    for path, value in changes.items():
        *parents, last = path.split("/")
        place: Any = copy
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = deepcopy(value)
    return copy


@pytest.mark.parametrize("overlay", overlay_names())
def test_what_is_shipped_keeps_every_rule(overlay: str) -> None:
    assert problems(build_overlay(overlay)) == []


@pytest.mark.parametrize("document", [CLUSTER, SERVICE, JOB, OWN_JOB, CRON], ids=lambda each: each["kind"])
def test_the_copies_are_sound_before_they_are_broken(document: Document) -> None:
    assert problems([document], gates=GATES) == []


@pytest.mark.parametrize(
    ("rule", "document", "changes"), RULES, ids=[f"{rule}-{i}" for i, (rule, *_) in enumerate(RULES)]
)
def test_a_copy_that_breaks_a_rule_is_refused(rule: str, document: Document, changes: dict[str, Any]) -> None:
    found = problems([broken(document, changes)], gates=frozenset() if rule.startswith("gate.") else GATES)
    assert rule in {problem.rule for problem in found}, found
    assert all(problem.message.endswith(".") for problem in found)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("incremental.gateway", {"stepSizePercent": 10, "intervalSeconds": 5}),
        ("incremental.step", {"gatewayClassName": "x", "intervalSeconds": 5}),
        (
            "incremental.step",
            {"gatewayClassName": "x", "stepSizePercent": 60, "maxSurgePercent": 50, "intervalSeconds": 5},
        ),
        (
            "incremental.surge",
            {"gatewayClassName": "x", "stepSizePercent": 60, "maxSurgePercent": 150, "intervalSeconds": 5},
        ),
        ("incremental.interval", {"gatewayClassName": "x", "stepSizePercent": 10, "intervalSeconds": 0}),
    ],
)
def test_an_incremental_upgrade_must_be_whole(rule: str, options: dict[str, Any]) -> None:
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    assert rule in {each.rule for each in problems([broken(SERVICE, {"spec/upgradeStrategy": strategy})])}


def test_incremental_upgrades_need_the_autoscaler_and_their_options_nothing_else() -> None:
    whole = {"gatewayClassName": "x", "stepSizePercent": 10, "intervalSeconds": 5}
    strategy = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": whole}
    changes = {"spec/upgradeStrategy": strategy, "spec/rayClusterConfig/enableInTreeAutoscaling": False}
    assert "incremental.autoscaling" in {each.rule for each in problems([broken(SERVICE, changes)])}
    changes = {"spec/upgradeStrategy": {"type": "None", "clusterUpgradeOptions": whole}}
    assert [each.rule for each in problems([broken(SERVICE, changes)])] == ["incremental.options"]


def test_every_rule_has_a_broken_copy() -> None:
    """Reads the rules' names from the source, so that none is added without a test."""
    import inspect
    import re

    from kuberay import rules

    source = inspect.getsource(rules)
    named = set(re.findall(r'yield \(?\s*"([a-z][\w.-]+\.[\w-]+)"', source)) | {"auth.token", "auth.k8s-token"}
    tested = {rule for rule, *_ in RULES}
    tested |= {f"incremental.{part}" for part in ("gateway", "step", "surge", "interval", "autoscaling", "options")}
    assert named <= tested
