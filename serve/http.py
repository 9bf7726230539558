"""The HTTP API, as an ASGI application that knows no Ray.

The two prediction routes are what the product is measured by, so they skip the framework's routing; they are declared
to it all the same, so that OpenAPI is whole. Every error becomes problem+json (RFC 9457) here, and statuses are
assigned nowhere else.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overtone import __version__, errors, metrics
from overtone.bundle import Bundle
from overtone.logging import get_logger
from serve import bodies
from serve.auth import Identity, KeyRing
from serve.classifier import INTERACTIVE_TEXTS, Answer, Classifier, Scores
from serve.files import file_response
from serve.openapi import ROUTES, describe

SESSION_COOKIE = "overtone_session"
_SESSION_S = 7 * 86_400

STATUS: Mapping[type[errors.OvertoneError], int] = {
    errors.OvertoneError: 500,
    errors.InvalidInputError: 422,
    errors.MalformedError: 400,
    errors.TooLargeError: 413,
    errors.UnsupportedMediaTypeError: 415,
    errors.UnauthorizedError: 401,
    errors.ForbiddenError: 403,
    errors.NotFoundError: 404,
    errors.OverloadedError: 429,
    errors.DeadlineExceededError: 504,
    errors.UnavailableError: 503,
    errors.EngineError: 500,
}
"""The status of each class of error, or of the nearest class above it."""

_JSON = "application/json"
_PROBLEM_JSON = "application/problem+json"
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
HOT_ROUTES = {("POST", "/predict"): "predict", ("POST", "/predict/batch"): "predict_batch"}
"""The routes that skip the framework, and their handlers."""

Handler = Callable[[Request], Awaitable[Response]]


class Records(Protocol):
    """What the routes ask of the database."""

    async def exchange_sign_in(self, token: str) -> str | None: ...
    async def create_session(self, key_id: str) -> str | None: ...
    async def revoke(self, key_id: str) -> bool: ...
    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need."""

    classifier: Classifier
    keys: KeyRing
    records: Records
    api_key_header: str = "X-API-Key"
    cors_origins: tuple[str, ...] = ()
    metrics_folder: Path | None = None
    sends_request_id: bool = True
    """False where the server in front has put an id on the request and will put it on the answer."""
    interactive_deadline_s: float = 30.0
    bulk_deadline_s: float = 600.0


def create_app(service: Service) -> ASGIApp:
    """The whole API over `service`."""
    routes = _Routes(service)
    framework = _framework(service, routes)
    hot: dict[tuple[str, str], Handler] = {route: getattr(routes, name) for route, name in HOT_ROUTES.items()}
    app: ASGIApp = _Dispatch(framework, hot)
    if service.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[service.api_key_header, "Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return _Edge(app, service.sends_request_id)


class _Edge:
    """Outermost: the request's id on every answer, and its count and duration."""

    def __init__(self, app: ASGIApp, sends_id: bool) -> None:
        self._app = app
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope["overtone.request_id"] = _request_id(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sends_id:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            method, route = scope["method"], _route(scope)
            if method not in _METHODS:
                method = "other"
            # 499: the client left before there was an answer.
            _request_counter(method, route, status or 499).inc()
            _duration(method, route).observe(time.perf_counter() - started)


class _Dispatch:
    """Sends the hot routes straight to their handlers and all else to the framework."""

    def __init__(self, framework: FastAPI, hot: Mapping[tuple[str, str], Handler]) -> None:
        self._framework = framework
        self._hot = hot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._hot.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await self._framework(scope, receive, send)
            return
        scope["overtone.route"] = scope["path"]
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except ClientDisconnect:
            return
        except Exception as error:  # the edge: whatever happened becomes an answer
            response = problem_response(request, error)
        await response(scope, receive, send)


class _Routes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._key_header = service.api_key_header.lower().encode("latin-1")

    async def predict(self, request: Request) -> Response:
        await self._authorise(request, "predict")
        text = bodies.text_of(await bodies.read_json(request))
        answer = await self._classify(request, [text], self._service.interactive_deadline_s)
        row = answer.rows[0]
        if isinstance(row, Exception):
            raise row
        return _json(_prediction(answer.bundle, row))

    async def predict_batch(self, request: Request) -> Response:
        await self._authorise(request, "predict")
        texts = bodies.texts_of(await bodies.read_json(request))
        service = self._service
        is_bulk = len(texts) > INTERACTIVE_TEXTS
        deadline_s = service.bulk_deadline_s if is_bulk else service.interactive_deadline_s
        answer = await self._classify(request, texts, deadline_s)
        predictions = [
            {"error": problem(request, row)} if isinstance(row, Exception) else _prediction(answer.bundle, row)
            for row in answer.rows
        ]
        return _json({"predictions": predictions, "model_version": answer.bundle.version})

    async def stats(self, request: Request) -> Response:
        await self._authorise(request, "read")
        minutes = _whole_number(request, "minutes", default=30, low=1, high=1440)
        newest = _whole_number(request, "newest", default=50, low=0, high=200)
        return _json(await self._service.records.figures(minutes=minutes, newest=newest), cached=False)

    async def health(self, request: Request) -> Response:
        return _json({"status": "alive"}, cached=False)

    async def ready(self, request: Request) -> Response:
        version = self._service.classifier.bundle.version
        return _json({"status": "ready", "model_version": version}, cached=False)

    async def metrics(self, request: Request) -> Response:
        text = await asyncio.to_thread(metrics.exposition, self._service.metrics_folder)
        return Response(text, headers={"content-type": metrics.CONTENT_TYPE, "cache-control": "no-store"})

    async def sign_in(self, request: Request) -> Response:
        token = request.query_params.get("token", "")
        secret = await self._service.records.exchange_sign_in(token[:512]) if token else None
        if secret is None:
            raise errors.UnauthorizedError("This link was used or has expired; `overtone status` prints a new one.")
        response = RedirectResponse("/", status_code=303, headers={"referrer-policy": "no-referrer"})
        return _with_session(response, request, secret)

    async def session(self, request: Request) -> Response:
        await self._authorise(request, "read")
        return Response(status_code=204, headers={"cache-control": "no-store"})

    async def start_session(self, request: Request) -> Response:
        body = await bodies.read_json(request, max_bytes=bodies.MAX_SMALL_BODY_BYTES)
        key = body.get("key") if isinstance(body, dict) else None
        if not isinstance(key, str) or not key:
            raise bodies.invalid([bodies.FieldError("key", "must be an API key")])
        identity = await self._service.keys.check(key, "read")
        secret = await self._service.records.create_session(identity.key_id)
        if secret is None:
            raise errors.UnauthorizedError("The API key is not known, was revoked or has expired.")
        return _with_session(Response(status_code=204), request, secret)

    async def end_session(self, request: Request) -> Response:
        secret = request.cookies.get(SESSION_COOKIE)
        if secret:
            identity = await self._service.keys.check(secret, "read")
            await self._service.records.revoke(identity.key_id)
        response = Response(status_code=204)
        response.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="strict")
        return response

    async def page(self, request: Request) -> Response:
        return file_response("index.html")

    async def docs(self, request: Request) -> Response:
        return file_response("docs.html")

    async def static(self, request: Request) -> Response:
        return file_response(request.path_params["path"])

    async def _classify(self, request: Request, texts: list[str], deadline_s: float) -> Answer:
        """Classify for as long as the client is there; its body has been read."""
        current = asyncio.current_task()
        assert current is not None
        watch = asyncio.get_running_loop().create_task(_cancel_when_left(request.receive, current))
        try:
            return await self._service.classifier.classify(texts, deadline_s=deadline_s)
        except asyncio.CancelledError:
            if not watch.done() or watch.cancelled():
                raise
            current.uncancel()
            raise ClientDisconnect from None
        finally:
            watch.cancel()

    async def _authorise(self, request: Request, scope: str) -> Identity:
        return await self._service.keys.check(self._secret(request), scope)

    def _secret(self, request: Request) -> str | None:
        """The secret a request carries: the key header wins over a bearer token, and that over the cookie."""
        bearer = None
        has_cookie = False
        for name, value in request.scope["headers"]:
            if name == self._key_header:
                return str(value, "latin-1")
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                bearer = str(value[7:], "latin-1").strip()
            elif name == b"cookie":
                has_cookie = True
        return bearer or (request.cookies.get(SESSION_COOKIE) if has_cookie else None)


async def _cancel_when_left(receive: Receive, task: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def problem(request: Request, error: Exception) -> dict[str, Any]:
    """`error` as RFC 9457 has it. Of an error that is not ours, nothing is told."""
    if isinstance(error, HTTPException):
        code = HTTPStatus(error.status_code).name.lower()
        title, detail, details = HTTPStatus(error.status_code).phrase, str(error.detail), {}
        status = error.status_code
    else:
        ours = error if isinstance(error, errors.OvertoneError) else errors.OvertoneError("The server failed.")
        code, detail, details = ours.code, ours.message, ours.details
        title = (type(ours).__doc__ or "").strip().splitlines()[0].rstrip(".")
        status = status_of(ours)
    return {
        "type": f"urn:overtone:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request.scope.get("overtone.request_id", b"").decode("latin-1"),
        "errors": [asdict(item) for item in details.get("errors", ()) if isinstance(item, bodies.FieldError)],
    }


def problem_response(request: Request, error: Exception) -> Response:
    """The answer for `error`, which is logged when the server is to blame."""
    body = problem(request, error)
    status = body["status"]
    if status == 500:
        get_logger().error("request.failed", code=body["code"], request_id=body["request_id"], exc_info=error)
    headers = {"cache-control": "no-store"}
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="overtone"'
    if status in {429, 503}:
        retry_after_s = error.retry_after_s if isinstance(error, errors.OverloadedError) else 1.0
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        metrics.REFUSED.labels(body["code"]).inc()
    return Response(orjson.dumps(body), status, headers, _PROBLEM_JSON)


def status_of(error: errors.OvertoneError) -> int:
    """The HTTP status of `error`."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def _framework(service: Service, routes: _Routes) -> FastAPI:
    app = FastAPI(title="Overtone", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_exception_handler(errors.OvertoneError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    for route in ROUTES:
        handler: Handler = getattr(routes, route.handler)
        app.add_api_route(route.path, handler, **route.options())
    describe(app, api_key_header=service.api_key_header, session_cookie=SESSION_COOKIE)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return problem_response(request, error)


def _json(value: Any, *, cached: bool = True) -> Response:
    headers = None if cached else {"cache-control": "no-store"}
    return Response(orjson.dumps(value), headers=headers, media_type=_JSON)


def _prediction(bundle: Bundle, scores: Scores) -> dict[str, Any]:
    confidence = max(scores)
    label = bundle.labels[scores.index(confidence)]
    _confidence(label).observe(confidence)
    return {
        "label": label,
        "confidence": confidence,
        "scores": dict(zip(bundle.labels, scores, strict=True)),
        "model_version": bundle.version,
    }


def _with_session(response: Response, request: Request, secret: str) -> Response:
    is_https = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
    response.set_cookie(
        SESSION_COOKIE, secret, max_age=_SESSION_S, path="/", httponly=True, samesite="strict", secure=is_https
    )
    response.headers["cache-control"] = "no-store"
    return response


def _whole_number(request: Request, name: str, *, default: int, low: int, high: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    value = int(given) if re.fullmatch(r"\d{1,9}", given, re.ASCII) else None
    if value is None or not low <= value <= high:
        raise bodies.invalid([bodies.FieldError(name, f"must be a whole number from {low} to {high}", high, value)])
    return value


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return bytes(value) if _REQUEST_ID.fullmatch(value) else uuid4().hex.encode()
    return uuid4().hex.encode()


_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


def _route(scope: Scope) -> str:
    """The route's pattern: a label with few values, whatever paths are tried."""
    known = scope.get("overtone.route")
    if known is not None:
        return str(known)
    return getattr(scope.get("route"), "path", None) or "unknown"


@cache
def _request_counter(method: str, route: str, status: int) -> Any:
    return metrics.HTTP_REQUESTS.labels(method, route, str(status))


@cache
def _duration(method: str, route: str) -> Any:
    return metrics.HTTP_DURATION.labels(method, route)


@cache
def _confidence(label: str) -> Any:
    return metrics.CONFIDENCE.labels(label)
