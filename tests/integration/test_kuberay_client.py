"""The client over HTTP, against a server that speaks as much of the Kubernetes API as it asks for, and fails on order.

A stand-in for KubeRay's operator works on the same objects: late, writing in between, and while watches are cut off.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from typer.testing import CliRunner

from kuberay.api import KubeApi
from kuberay.build import Document, build_overlay
from kuberay.client import HISTORY, Patience, Stack
from kuberay.states import State
from overtone import errors
from overtone.cli.app import app

KNOWN = (
    "namespaces services serviceaccounts configmaps persistentvolumeclaims pods statefulsets deployments jobs cronjobs"
    " ingresses networkpolicies poddisruptionbudgets roles priorityclasses rayservices rayjobs rayclusters clusters"
    " objectstores scheduledbackups"
).split()
Status = tuple[int, dict[str, Any]]


def status_of(code: int, message: str, name: str = "") -> Status:
    details = {"name": name} if name else {}
    return code, {"kind": "Status", "status": "Failure", "code": code, "message": message, "details": details}


def merged(old: Any, new: Any) -> Any:
    """RFC 7386."""
    if not isinstance(new, dict):
        return deepcopy(new)
    out = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value)
    return out


class KubeServer:
    """Objects by path, a log of their changes, and what is to go wrong next."""

    def __init__(self) -> None:
        self.objects: dict[str, Document] = {}
        self.changed = threading.Condition()
        self.log: list[tuple[int, str, str, Document]] = []
        self.version = 0
        self.oldest = 0
        self.faults: deque[Callable[[str, str], Status | str | None]] = deque()
        self.models: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.is_closing = False

    def write(self, path: str, document: Document | None) -> Document:
        """Store a document, or delete what is there, and tell the watches."""
        with self.changed:
            self.version += 1
            old = self.objects.get(path)
            stored = deepcopy(document or old or {})
            metadata = stored.setdefault("metadata", {})
            metadata["resourceVersion"] = str(self.version)
            metadata.setdefault("uid", f"uid-{self.version}")
            before = (old or {}).get("spec")
            generation = (old or {}).get("metadata", {}).get("generation", 0)
            metadata["generation"] = generation + 1 if stored.get("spec") != before else generation
            kind = "DELETED" if document is None else "MODIFIED" if old else "ADDED"
            if document is None:
                self.objects.pop(path)
            else:
                self.objects[path] = stored
            self.log.append((self.version, kind, path, deepcopy(stored)))
            self.changed.notify_all()
            return deepcopy(stored)

    def forget(self) -> None:
        """Watches from before now are answered with 410."""
        with self.changed:
            self.oldest = self.version
            self.version += 1

    def answer(self, method: str, path: str, query: dict[str, str], content_type: str, body: Any) -> Status:
        if path.endswith("/proxy/models"):
            return 200, self.models[0] if len(self.models) == 1 else self.models.pop(0)
        parts = path.rpartition("/namespaces/")[2].split("/")
        is_namespaced = "/namespaces/" in path and len(parts) > 1
        plural = parts[1] if is_namespaced else path.split("/")[3 if path.startswith("/api/") else 4]
        if plural not in KNOWN:
            return 404, {"kind": "Status", "code": 404, "message": "the server could not find the requested resource"}
        name = path.rsplit("/", 1)[1]
        if method == "GET" and name == plural:
            return 200, {"items": [each for key, each in self.objects.items() if key.rsplit("/", 1)[0] == path]}
        with self.changed:
            return self.change(method, path, name, query, content_type, body)

    def change(self, method: str, path: str, name: str, query: dict[str, str], content_type: str, body: Any) -> Status:  # noqa: PLR0911
        old = self.objects.get(path)
        is_apply = content_type.startswith("application/apply-patch")
        if old is None and not is_apply:
            return status_of(404, f'"{name}" not found', name)
        if method == "GET":
            assert old is not None
            return 200, deepcopy(old)
        if method == "DELETE":
            if "dryRun" not in query:
                self.write(path, None)
            return 200, {"kind": "Status", "status": "Success"}
        wanted = body["metadata"].get("resourceVersion")
        if old is not None and wanted is not None and wanted != old["metadata"]["resourceVersion"]:
            return status_of(409, "the object has been modified; please apply your changes to the latest version", name)
        if is_apply and old is not None and body["kind"] == "Job" and body["spec"] != old["spec"]:
            return status_of(422, "spec.template: Invalid value: field is immutable", name)
        body = merged(body, {"metadata": {"resourceVersion": None}})
        result = merged(old or {}, body)
        if "dryRun" in query:
            return 200, result
        if old is not None and {**old, "metadata": {}} == {**result, "metadata": {}} and is_apply:
            return 200, deepcopy(old)
        return 200, self.write(path, result)

    def events(self, path: str, name: str, since: int, seconds: float) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_closing:
            with self.changed:
                if since < self.oldest:
                    yield {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}
                    return
                found = [each for each in self.log if each[0] > since and each[2] == f"{path}/{name}"]
                if not found:
                    self.changed.wait(min(0.05, max(end - time.monotonic(), 0.001)))
                    continue
            for version, kind, _, document in found:
                since = version
                yield {"type": kind, "object": document}


def handler_of(server: KubeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else None
            server.requests.append(f"{self.command} {parts.path}")
            fault = server.faults[0](self.command, self.path) if server.faults else None
            if fault is not None:
                server.faults.popleft()
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
                return
            if isinstance(fault, tuple):
                self.reply(fault)
            elif "watch" in query:
                self.stream(parts.path, query)
            else:
                kind = self.headers.get("Content-Type") or ""
                self.reply(server.answer(self.command, parts.path, query, kind, body))

        do_GET = do_PATCH = do_DELETE = do_POST = handle_any  # noqa: N815

        def reply(self, status: Status) -> None:
            content = json.dumps(status[1]).encode()
            self.send_response(status[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status[0] == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        def stream(self, path: str, query: dict[str, str]) -> None:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            name = query["fieldSelector"].removeprefix("metadata.name=")
            for number, event in enumerate(
                server.events(path, name, int(query["resourceVersion"]), float(query["timeoutSeconds"]))
            ):
                line = json.dumps(event).encode() + b"\n"
                # Every third event is cut in the middle, with its connection.
                if number == 2:
                    self.wfile.write(line[: len(line) // 2])
                    return
                self.wfile.write(line)
                self.wfile.flush()

    return Handler


SERVICE = "/apis/ray.io/v1/namespaces/overtone/rayservices/overtone"


class Operator(threading.Thread):
    """Does what KubeRay and its neighbours do, a little later, and writes to objects when nobody expects it."""

    def __init__(self, server: KubeServer) -> None:
        super().__init__(daemon=True)
        self.server, self.ends = server, threading.Event()
        self.bad_bundles = {"/models/bad"}
        self.bad_images = {"ghcr.io/overtone/overtone:bad"}
        self.clusters = 0

    def run(self) -> None:
        while not self.ends.wait(0.03):
            for path, document in list(self.server.objects.items()):
                with self.server.changed:
                    current = self.server.objects.get(path)
                    if (
                        current is None
                        or current["metadata"]["resourceVersion"] != document["metadata"]["resourceVersion"]
                    ):
                        continue
                    status = self.status(deepcopy(current))
                    if status is not None and status != current.get("status"):
                        self.server.write(path, {**current, "status": status})

    def status(self, document: Document) -> dict[str, Any] | None:
        generation = document["metadata"]["generation"]
        match document["kind"]:
            case "Job":
                return {"conditions": [{"type": "Complete", "status": "True"}]}
            case "StatefulSet" | "Deployment":
                return {"observedGeneration": generation, "readyReplicas": document["spec"].get("replicas", 1)}
            case "Cluster":
                return {"readyInstances": document["spec"]["instances"], "phase": "Cluster in healthy state"}
            case "RayService":
                return self.service(document, generation)
        return None

    def service(self, document: Document, generation: int) -> dict[str, Any]:
        spec, status = document["spec"], document.get("status") or {}
        # The operator saw the change, Serve has not yet: what it says is old.
        if status.get("observedGeneration") != generation:
            return status | {"observedGeneration": generation}
        if spec.get("suspend"):
            return {"observedGeneration": generation, "conditions": [{"type": "Suspended", "status": "True"}]}
        config = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"][0]["user_config"]
        image = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        mark = (
            spec["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]
            .get("annotations", {})
            .get("overtone/rollout")
        )
        state = "DEPLOY_FAILED" if config["bundle"] in self.bad_bundles else "RUNNING"
        applications = {"overtone": {"status": state, "message": "no such bundle" if state != "RUNNING" else ""}}
        active = status.get("activeServiceStatus") or {}
        pending = status.get("pendingServiceStatus") or {}
        if not active:
            self.clusters += 1
            active = {"rayClusterName": f"overtone-{self.clusters}", "mark": mark}
        if spec["upgradeStrategy"]["type"] == "NewCluster" and mark != active.get("mark"):
            if image in self.bad_images:
                bad = {"overtone": {"status": "DEPLOY_FAILED", "message": "image cannot be pulled"}}
                pending = {"rayClusterName": "overtone-bad", "applicationStatuses": bad}
            elif not pending:
                self.clusters += 1
                pending = {"rayClusterName": f"overtone-{self.clusters}", "mark": mark}
            else:
                active, pending = {**pending, "mark": mark}, {}
        elif spec["upgradeStrategy"]["type"] == "None":
            pending = {}
        return {
            "observedGeneration": generation,
            "conditions": [{"type": "Ready", "status": "True"}],
            "numServeEndpoints": 4,
            "activeServiceStatus": {**active, "applicationStatuses": applications},
            "pendingServiceStatus": pending,
        }


@pytest.fixture
def server() -> Iterator[KubeServer]:
    server = KubeServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_address[1]}"  # type: ignore[attr-defined]
    yield server
    server.is_closing = True
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def operator(server: KubeServer) -> Iterator[Operator]:
    operator = Operator(server)
    operator.start()
    yield operator
    operator.ends.set()
    operator.join()


@pytest.fixture
def kubeconfig(server: KubeServer, tmp_path: Path) -> Path:
    path = tmp_path / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server.address}}],  # type: ignore[attr-defined]
        "users": [{"name": "test", "user": {"token": "secret"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


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


def service_of(server: KubeServer) -> Document:
    return server.objects[SERVICE]


def user_config(server: KubeServer) -> dict[str, Any]:
    config = yaml.safe_load(service_of(server)["spec"]["serveConfigV2"])
    found: dict[str, Any] = config["applications"][0]["deployments"][0]["user_config"]
    return found


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
