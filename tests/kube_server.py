"""A server that speaks as much of the Kubernetes API as `kuberay` asks for, and fails on order; and what works on it.

A stand-in for KubeRay's operator works on the same objects: late, writing in between, and while watches are cut off.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from kuberay.build import Document

KNOWN = (
    "namespaces services serviceaccounts configmaps persistentvolumeclaims pods statefulsets deployments jobs cronjobs"
    " ingresses networkpolicies poddisruptionbudgets roles rolebindings priorityclasses rayservices rayjobs rayclusters"
    " clusters objectstores scheduledbackups"
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

    address = ""

    def __init__(self) -> None:
        self.objects: dict[str, Document] = {}
        self.changed = threading.Condition()
        self.log: list[tuple[int, str, str, Document]] = []
        self.version = 0
        self.oldest = 0
        self.faults: deque[Callable[[str, str], Status | str | None]] = deque()
        self.models: list[dict[str, Any]] = []
        self.replica: Callable[[str], Status] | None = None
        """What answers `GET /models` for an API key; without it `models` does, one after the other."""
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
            if parts.path.endswith("/models") and server.replica is not None:
                self.reply(server.replica(self.headers.get("X-API-Key") or ""))
                return
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
        self.bad_bundles: set[str | None] = {"/models/bad"}
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


@contextmanager
def serving() -> Iterator[KubeServer]:
    """A server on a port of its own."""
    server = KubeServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        server.is_closing = True
        http.shutdown()
        http.server_close()
        thread.join()


@contextmanager
def operating(server: KubeServer) -> Iterator[Operator]:
    """An operator at work on `server`."""
    operator = Operator(server)
    operator.start()
    try:
        yield operator
    finally:
        operator.ends.set()
        operator.join()


def write_kubeconfig(server: KubeServer, path: Path) -> Path:
    """A kubeconfig in `path` that names `server`; its path."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server.address}}],
        "users": [{"name": "test", "user": {"token": "secret"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


def service_of(server: KubeServer) -> Document:
    """The RayService."""
    return server.objects[SERVICE]


def user_config(server: KubeServer) -> dict[str, Any]:
    """What the RayService orders of replicas."""
    config = yaml.safe_load(service_of(server)["spec"]["serveConfigV2"])
    found: dict[str, Any] = config["applications"][0]["deployments"][0]["user_config"]
    return found
