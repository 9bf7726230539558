"""The Kubernetes API over HTTP: objects as plain dictionaries, server-side apply, watches that mend themselves.

Credentials, certificates and addresses are the business of the `kubernetes` package, from a kubeconfig or from the pod
this runs in. Every refusal becomes a class of `overtone.errors`.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlencode

import urllib3

from kuberay.build import Document
from overtone.errors import (
    ClusterConflictError,
    ClusterError,
    ClusterForbiddenError,
    ClusterQuotaError,
    ClusterUnavailableError,
    ConfigurationError,
    MissingKindError,
    NotFoundError,
    OvertoneError,
)

MANAGER = "overtone"
"""Name under which the fields we apply are ours."""

_TRIES = 5
_TIMEOUT_S = 30.0
_LONGEST_PAUSE_S = 10.0
_WATCH_S = 60
_TRANSIENT = {429, 500, 502, 503, 504}

_CLUSTER_WIDE = {"Namespace", "PriorityClass"}
_PLURALS = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies", "PriorityClass": "priorityclasses"}


class GoneError(Exception):
    """The server no longer has the changes since that version: read the object anew."""


class KubeApi:
    """One connection to one cluster. Not for use by several threads."""

    def __init__(self, context: str | None = None, kubeconfig: str | None = None, *, pause_s: float = 0.5) -> None:
        """`pause_s` is the first pause before a request is tried again; it doubles each time, up to 10 seconds.

        Raises:
            ConfigurationError: neither a kubeconfig nor a pod's credentials are there, or they cannot be read.
        """
        try:
            from kubernetes import client, config
        except ImportError:
            raise ConfigurationError("kubernetes is not installed; pip install 'overtone[kube]'") from None
        chosen = client.Configuration()
        try:
            config.load_kube_config(kubeconfig, context, client_configuration=chosen)
        except (config.ConfigException, OSError) as error:
            if context or kubeconfig:
                raise ConfigurationError(f"The kubeconfig cannot be used: {error}") from None
            try:
                config.load_incluster_config(client_configuration=chosen)
            except config.ConfigException:
                raise ConfigurationError(
                    f"No cluster is configured: {error}. Give --kubeconfig or --context."
                ) from None
        self._configuration = chosen
        self._pool: urllib3.PoolManager = client.ApiClient(chosen).rest_client.pool_manager
        self._pause_s = pause_s

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def get(self, kind: str, name: str, namespace: str, api_version: str) -> Document:
        """The object.

        Raises:
            NotFoundError: there is none of that name.
            MissingKindError: the cluster does not know the kind.
        """
        found: Document = self._json("GET", path_of(api_version, kind, namespace, name))
        return found

    def find(self, document: Document) -> Document | None:
        """The object in the cluster that `document` describes, None if there is none."""
        metadata = document["metadata"]
        try:
            return self.get(document["kind"], metadata["name"], metadata.get("namespace", ""), document["apiVersion"])
        except NotFoundError:
            return None

    def list(self, kind: str, namespace: str, api_version: str, *, selector: str = "") -> list[Document]:
        """The objects of a kind whose labels match `selector`."""
        query = {"labelSelector": selector} if selector else {}
        found = self._json("GET", path_of(api_version, kind, namespace), query)
        return [{"apiVersion": api_version, "kind": kind, **each} for each in found.get("items") or []]

    def apply(self, document: Document, *, dry_run: bool = False, force: bool = True) -> Document:
        """Server-side apply; returns the object as it is then (with `dry_run`: as it would be).

        Raises:
            ClusterConflictError: without `force`, another writer owns a field that this changes.
        """
        metadata = document["metadata"]
        path = path_of(document["apiVersion"], document["kind"], metadata.get("namespace", ""), metadata["name"])
        query = {"fieldManager": MANAGER, "force": str(force).lower()} | ({"dryRun": "All"} if dry_run else {})
        applied: Document = self._json("PATCH", path, query, document, "application/apply-patch+yaml")
        return applied

    def patch(self, document: Document, change: Mapping[str, Any], *, dry_run: bool = False) -> Document:
        """Merge `change` into the object that `document` is a copy of.

        Raises:
            ClusterConflictError: the object has changed since `document` was read.
        """
        metadata = document["metadata"]
        path = path_of(document["apiVersion"], document["kind"], metadata.get("namespace", ""), metadata["name"])
        query = {"fieldManager": MANAGER} | ({"dryRun": "All"} if dry_run else {})
        guarded = {**change, "metadata": {**change.get("metadata", {}), "resourceVersion": metadata["resourceVersion"]}}
        patched: Document = self._json("PATCH", path, query, guarded, "application/merge-patch+json")
        return patched

    def delete(self, document: Document, *, dry_run: bool = False) -> bool:
        """Delete the object and, in the background, what it owns; whether there was one."""
        metadata = document["metadata"]
        path = path_of(document["apiVersion"], document["kind"], metadata.get("namespace", ""), metadata["name"])
        query = {"propagationPolicy": "Background"} | ({"dryRun": "All"} if dry_run else {})
        try:
            self._json("DELETE", path, query)
        except NotFoundError:
            return False
        return True

    def log_lines(self, pod: str, namespace: str, *, container: str, tail: int, follow: bool) -> Iterator[str]:
        """Lines of a container's log, without their ends; with `follow` until the container ends."""
        query = {"container": container, "tailLines": str(tail)} | ({"follow": "true"} if follow else {})
        path = path_of("v1", "Pod", namespace, pod) + "/log"
        answer = self._open("GET", path, query, timeout=None if follow else _TIMEOUT_S)
        yield from (line.decode(errors="replace") for line in _lines(answer))

    def ask_service(self, service: str, namespace: str, path: str, headers: Mapping[str, str]) -> Any:
        """The JSON that a GET of `path` from `service` (NAME:PORT) answers, asked through the API server."""
        whole = f"{path_of('v1', 'Service', namespace, service)}/proxy/{path.lstrip('/')}"
        return self._json("GET", whole, headers=headers)

    def follow(self, document: Document, deadline: float, *, every_s: int = _WATCH_S) -> Iterator[Document | None]:
        """The object as it is, then each time it changes, until `deadline` (of `time.monotonic`); None: there is none.

        A watch that is dropped or refused is resumed where it was; one whose past the server has forgotten begins anew.
        The current state also comes at least every `every_s` seconds, so that one who waits sees the time go by.
        """
        kind, metadata = document["kind"], document["metadata"]
        place = (document["apiVersion"], kind, metadata.get("namespace", ""))
        pause_s, version = self._pause_s, None
        current: Document | None = None
        while True:
            try:
                if version is None:
                    current = self.find(document)
                    version = current["metadata"]["resourceVersion"] if current else "0"
                    yield current
                for event in self._watch(
                    path_of(*place), metadata["name"], version, min(deadline, time.monotonic() + every_s)
                ):
                    pause_s = self._pause_s
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        current = None if event["type"] == "DELETED" else event["object"]
                        yield current
                # The server's events end now and then; what it said last still holds.
                version = None if current is None else version
            except GoneError:
                version = None
            except (ClusterUnavailableError, urllib3.exceptions.HTTPError, OSError, ValueError):
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            if time.monotonic() >= deadline:
                return
            time.sleep(min(pause_s, max(deadline - time.monotonic(), 0.0)))
            yield current

    def _watch(self, path: str, name: str, version: str, deadline: float) -> Iterator[dict[str, Any]]:
        seconds = max(1, min(_WATCH_S, int(deadline - time.monotonic()) + 1))
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        answer = self._open("GET", path, query, timeout=seconds + 5.0, tries=1)
        try:
            for line in _lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    if event["object"].get("code") == 410:
                        raise GoneError
                    raise _refusal(int(event["object"].get("code", 500)), event["object"], path)
                yield event
        finally:
            answer.close()

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        extra = {"Content-Type": content_type, **(headers or {})}
        answer = self._open(method, path, query or {}, body=body, headers=extra)
        try:
            return json.loads(answer.data)
        except ValueError as error:
            raise ClusterError(f"{method} {path}: the answer is no JSON.") from error
        finally:
            answer.release_conn()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = _TIMEOUT_S,
        tries: int = _TRIES,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, again where that can help, and return the answer, whose body is still to be read."""
        url = f"{self._configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        content = None if body is None else json.dumps(body).encode()
        limits = urllib3.Timeout(connect=10.0, read=timeout)
        for attempt in range(tries):
            is_last = attempt == tries - 1
            try:
                answer = self._pool.request(
                    method,
                    url,
                    body=content,
                    headers={"Accept": "application/json", **self._credentials(), **(headers or {})},
                    timeout=limits,
                    retries=False,
                    preload_content=False,
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if is_last:
                    raise ClusterUnavailableError(f"{self._configuration.host} does not answer: {error}") from error
                time.sleep(min(self._pause_s * 2**attempt, _LONGEST_PAUSE_S))
                continue
            if answer.status < 300:
                return answer
            wait_s = _retry_after(answer)
            refusal = _refusal(answer.status, _status(answer), f"{method} {path}")
            if answer.status not in _TRANSIENT or is_last:
                if answer.status == 410:
                    raise GoneError
                raise refusal
            time.sleep(min(self._pause_s * 2**attempt if wait_s is None else wait_s, _LONGEST_PAUSE_S))
        raise AssertionError("unreachable")

    def _credentials(self) -> dict[str, str]:
        found = self._configuration.auth_settings().get("BearerToken")
        return {found["key"]: found["value"]} if found and found["value"] else {}


def path_of(api_version: str, kind: str, namespace: str = "", name: str = "") -> str:
    """The path of an object, or of all of a kind."""
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    plural = _PLURALS.get(kind, f"{kind.lower()}s")
    scope = "" if kind in _CLUSTER_WIDE or not namespace else f"/namespaces/{namespace}"
    return f"{root}{scope}/{plural}" + (f"/{quote(name, safe=':')}" if name else "")


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    # Whatever has come: `stream` would wait for a whole buffer.
    while part := answer.read1(65536):
        *whole, rest = (rest + part).split(b"\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest


def _status(answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
    text = answer.data.decode(errors="replace")
    answer.release_conn()
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {"message": text.strip()[:500]}


def _retry_after(answer: urllib3.BaseHTTPResponse) -> float | None:
    given = answer.headers.get("Retry-After", "")
    return float(given) if given.isdigit() else None


def _refusal(code: int, status: Mapping[str, Any], what: str) -> OvertoneError:
    """The error for an answer that is none of success."""
    message = str(status.get("message") or status.get("detail") or f"status {code}")
    details = status.get("details") or {}
    if code == 403 and "exceeded quota" in message:
        return ClusterQuotaError(f"{what}: {message}. Raise the quota, or ask for less.")
    if code in {401, 403}:
        return ClusterForbiddenError(f"{what}: {message}. Bind the Role overtone-operator to this account.")
    if code == 404 and not details.get("name"):
        return MissingKindError(f"{what}: the cluster does not know this kind; is its operator installed?")
    transient: dict[int, type[OvertoneError]] = dict.fromkeys(_TRANSIENT, ClusterUnavailableError)
    return (transient | {404: NotFoundError, 409: ClusterConflictError}).get(code, ClusterError)(f"{what}: {message}")
