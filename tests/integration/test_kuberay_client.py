"""The client over HTTP, against a server that speaks as much of the Kubernetes API as it asks for."""

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kube_server import (
    SERVICE,
    KubeServer,
    Operator,
    Status,
    merged,
    operating,
    service_of,
    serving,
    status_of,
    user_config,
    write_kubeconfig,
)
from kuberay.api import KubeApi
from kuberay.build import build_overlay
from kuberay.client import Patience, Stack
from kuberay.spec import HISTORY
from kuberay.states import State
from overtone import errors
from overtone.cli.app import app


@pytest.fixture
def server() -> Iterator[KubeServer]:
    with serving() as server:
        yield server


@pytest.fixture
def operator(server: KubeServer) -> Iterator[Operator]:
    with operating(server) as operator:
        yield operator


@pytest.fixture
def kubeconfig(server: KubeServer, tmp_path: Path) -> Path:
    return write_kubeconfig(server, tmp_path / "kubeconfig")


@pytest.fixture
def api(kubeconfig: Path) -> Iterator[KubeApi]:
    api = KubeApi(kubeconfig=str(kubeconfig), pause_s=0.01)
    yield api
    api.close()


@pytest.fixture
def stack(api: KubeApi) -> Stack:
    return Stack(api)


DEV = build_overlay("dev")
PATIENCE = Patience(timeout_s=20.0, settle_s=0.3)


def quiet(_: State) -> None:
    pass


def image(server: KubeServer) -> str:
    head = service_of(server)["spec"]["rayClusterConfig"]["headGroupSpec"]
    return str(head["template"]["spec"]["containers"][0]["image"])


def test_a_life_of_deployments(server: KubeServer, operator: Operator, stack: Stack) -> None:
    """Deploy, wait, scale, roll out, fail to, roll back: with watches cut off all the time."""
    seen: list[State] = []
    changes = stack.deploy(DEV, PATIENCE, seen.append)
    assert {each.action for each in changes} == {"created"}
    assert seen[-1].ready

    stack.scale("serve-cpu", 3)
    groups = {each["groupName"]: each for each in service_of(server)["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert [groups["serve-cpu"][key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]

    stack.roll_bundle("/models/good", PATIENCE, quiet, api_key=None)
    assert user_config(server)["bundle"] == "/models/good"
    with pytest.raises(errors.RolloutError, match=r"no such bundle.*served again"):
        stack.roll_bundle("/models/bad", PATIENCE, quiet, api_key=None)
    assert user_config(server)["bundle"] == "/models/good"
    assert user_config(server)["revision"] == 3

    stack.roll_bundle("/models/better", PATIENCE, quiet, api_key=None)
    stack.roll_back(PATIENCE, quiet)
    assert user_config(server)["bundle"] == "/models/good"
    stack.deploy(DEV, PATIENCE, quiet)
    assert user_config(server)["bundle"] == "/models/good", "deploying again takes no rollout back"


def test_an_image_is_rolled_out_on_a_second_cluster(server: KubeServer, operator: Operator, stack: Stack) -> None:
    stack.deploy(DEV, PATIENCE, quiet)
    stack.train("trial", "python -m train")
    with pytest.raises(errors.ClusterError, match="Training runs on overtone-1: trial"):
        stack.roll_cluster("ghcr.io/overtone/overtone:0.2.0", PATIENCE, quiet)
    job = "/apis/ray.io/v1/namespaces/overtone/rayjobs/trial"
    server.write(job, server.objects[job] | {"status": {"jobStatus": "SUCCEEDED"}})

    stack.roll_cluster("ghcr.io/overtone/overtone:0.2.0", PATIENCE, quiet)
    assert image(server) == "ghcr.io/overtone/overtone:0.2.0"
    assert service_of(server)["status"]["activeServiceStatus"]["rayClusterName"] == "overtone-2"
    assert service_of(server)["spec"]["upgradeStrategy"] == {"type": "None"}

    with pytest.raises(errors.RolloutError, match="cannot be pulled"):
        stack.roll_cluster("ghcr.io/overtone/overtone:bad", PATIENCE, quiet)
    assert image(server) == "ghcr.io/overtone/overtone:0.2.0"
    assert service_of(server)["status"]["activeServiceStatus"]["rayClusterName"] == "overtone-2"


def test_a_refused_bundle_is_found_by_asking_replicas(server: KubeServer, operator: Operator, stack: Stack) -> None:
    stack.deploy(DEV, PATIENCE, quiet)
    champion = {"folder": "/models/old"}
    server.models = [{"revision": 1, "champion": champion, "refused": [{"reason": "golden scores differ"}]}]
    with pytest.raises(errors.RolloutError, match="golden scores differ"):
        stack.roll_bundle("/models/unfit", PATIENCE, quiet, api_key="k")
    assert user_config(server)["bundle"] is None
    server.models = [{"revision": 3, "champion": {"folder": "/models/fit"}, "refused": []}]
    assert stack.roll_bundle("/models/fit", PATIENCE, quiet, api_key="k")


def test_waiting_survives_a_server_that_forgets_and_fails(server: KubeServer, api: KubeApi) -> None:
    stub = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "overtone", "namespace": "overtone"}}
    server.write(SERVICE, {**stub, "spec": {"n": 0}})
    seen: list[int] = []
    for document in api.follow(stub, time.monotonic() + 20.0):
        number = document["spec"]["n"] if document else -1
        seen.append(number)
        if number == 6:
            break
        server.write(SERVICE, {**stub, "spec": {"n": number + 1}})
        if number == 2:
            server.forget()
        if number == 4:
            server.faults.extend(
                [lambda *_: "drop", lambda *_: status_of(503, "busy"), lambda *_: status_of(429, "slow")]
            )
    assert sorted(set(seen)) == list(range(7))
    assert any("watch" not in each for each in server.requests)


def test_changes_of_others_in_between_are_kept(server: KubeServer, operator: Operator, stack: Stack) -> None:
    stack.deploy(DEV, PATIENCE, quiet)
    cut = 3

    def interfere(method: str, path: str) -> Status | None:
        nonlocal cut
        if method == "PATCH" and cut:
            cut -= 1
            labels = {"metadata": {"labels": {f"other-{cut}": "x"}}}
            server.write(SERVICE, merged(service_of(server), labels))
        return None

    server.faults.append(interfere)
    stack.scale("serve-cpu", 2)
    assert {f"other-{number}" for number in range(3)} <= set(service_of(server)["metadata"]["labels"])


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status_of(403, 'rayservices.ray.io is forbidden: User "x" cannot patch'), errors.ClusterForbiddenError),
        (status_of(401, "Unauthorized"), errors.ClusterForbiddenError),
        (status_of(403, "exceeded quota: compute, requested: pods=1"), errors.ClusterQuotaError),
        (status_of(404, "the server could not find the requested resource"), errors.MissingKindError),
        (status_of(409, "conflict with kubectl: .spec.replicas", "x"), errors.ClusterConflictError),
        (status_of(422, "admission webhook denied the request", "x"), errors.ClusterError),
    ],
)
def test_refusals_have_classes(server: KubeServer, api: KubeApi, fault: Status, error: type[Exception]) -> None:
    server.faults.append(lambda *_: fault)
    with pytest.raises(error) as caught:
        api.apply(DEV[0])
    assert type(caught.value) is error


def test_a_busy_server_is_asked_again_and_a_dead_one_given_up(server: KubeServer, api: KubeApi) -> None:
    server.faults.extend([lambda *_: "drop", lambda *_: status_of(500, "x"), lambda *_: status_of(429, "y")])
    assert api.apply(DEV[0])["metadata"]["name"] == "overtone"
    server.faults.extend([lambda *_: status_of(503, "etcd is down")] * 5)
    with pytest.raises(errors.ClusterUnavailableError, match="etcd is down"):
        api.apply(DEV[0])


def test_an_operator_that_is_not_there_and_one_that_sleeps(server: KubeServer, stack: Stack) -> None:
    with pytest.raises(errors.MissingKindError, match="is its operator installed"):
        stack.apply([each for each in build_overlay("production") if each["kind"] == "PodMonitor"])
    with pytest.raises(errors.ClusterTimeoutError, match="the operator has not seen it yet"):
        stack.deploy([each for each in DEV if each["kind"] == "RayService"], Patience(0.5, 0.1), quiet)


def test_nothing_is_sent_of_what_breaks_a_rule(server: KubeServer, stack: Stack) -> None:
    broken = [deepcopy(each) for each in DEV]
    next(each for each in broken if each["kind"] == "RayService")["metadata"]["name"] = "x" * 60
    with pytest.raises(errors.ManifestError, match=r"name\.length"):
        stack.apply(broken)
    assert server.requests == []


def test_a_job_that_ran_gives_way_to_the_new_one(server: KubeServer, stack: Stack) -> None:
    job = next(each for each in DEV if each["kind"] == "Job")
    stack.apply([job])
    changed = deepcopy(job)
    changed["spec"]["backoffLimit"] = 1
    stack.apply([changed])
    assert server.objects["/apis/batch/v1/namespaces/overtone/jobs/overtone-migrate"]["spec"]["backoffLimit"] == 1


def test_a_dry_run_changes_nothing_and_delete_leaves_data(server: KubeServer, operator: Operator, stack: Stack) -> None:
    assert {each.action for each in stack.apply(DEV, dry_run=True)} == {"created"}
    assert server.objects == {}
    stack.deploy(DEV, PATIENCE, quiet)
    stack.suspend(True)
    gone = stack.delete(DEV)
    assert "RayService/overtone" in gone
    left = {document["kind"] for document in server.objects.values()}
    assert left == {"Namespace", "PersistentVolumeClaim", "PriorityClass", "Cluster"}
    with pytest.raises(errors.NotFoundError):
        stack.service()


def test_there_is_nothing_to_roll_back_before_a_rollout(server: KubeServer, operator: Operator, stack: Stack) -> None:
    stack.deploy(DEV, PATIENCE, quiet)
    assert HISTORY not in service_of(server)["metadata"].get("annotations", {})
    with pytest.raises(errors.NotFoundError, match="no rollout"):
        stack.roll_back(PATIENCE, quiet)
    with pytest.raises(errors.NotFoundError, match="serve-cpu"):
        stack.scale("no-such-group", 1)


def test_the_command(server: KubeServer, operator: Operator, kubeconfig: Path, tmp_path: Path) -> None:
    runner = CliRunner(env={"OVERTONE_HOME": str(tmp_path), "COLUMNS": "200"})

    def run(*words: str, code: int = 0) -> Any:
        given = ["k8s", "--kubeconfig", str(kubeconfig), words[0], "--json", *words[1:]]
        result = runner.invoke(app, given, standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        assert (result.return_value or 0) == code
        return json.loads(result.stdout)

    assert len(run("render", "dev")) == len(DEV)
    assert len(run("diff", "dev", code=1)) == len(DEV)
    assert run("deploy", "dev", "--dry-run")["changes"][0]["action"] == "created"
    assert {each["action"] for each in run("deploy", "dev", "--timeout", "20s")["changes"]} == {"created"}
    assert run("diff", "dev") == []
    assert {each["kind"] for each in run("status")} >= {"RayService", "StatefulSet", "Job"}
    assert run("wait", "--timeout", "20s") == {"ready": True}
    assert run("scale", "serve-cpu", "2")["replicas"] == 2
    job = run("submit-train", "--name", "trial", "--dry-run", "--", "--config", "configs/train/tweets.yaml")
    assert job == {"rayjob": "trial", "dry_run": True}
    assert run("suspend") == {"suspended": True, "dry_run": False}
    assert run("suspend", "--resume") == {"suspended": False, "dry_run": False}
    with pytest.raises(errors.ConfigurationError, match="Give one of"):
        run("rollout")
    with pytest.raises(errors.NotFoundError):
        run("rollback")
    assert "RayService/overtone" in run("delete", "dev", "--yes")["deleted"]


def test_exit_codes_tell_a_pipeline_what_happened() -> None:
    from overtone.cli.exits import exit_code

    codes = {
        errors.ManifestError: 2,
        errors.ClusterForbiddenError: 4,
        errors.ClusterUnavailableError: 6,
        errors.ClusterQuotaError: 12,
        errors.MissingKindError: 12,
        errors.ClusterConflictError: 12,
        errors.ClusterTimeoutError: 13,
        errors.RolloutError: 14,
    }
    assert {cls: exit_code(cls("x")) for cls in codes} == codes
