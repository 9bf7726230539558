"""The HTTP API, as an ASGI application that knows no Ray.

The two prediction routes are what the product is measured by, so they skip the framework's routing; they are declared
to it all the same, so that OpenAPI is whole. Every error becomes problem+json in `serve.problems`.
"""

import re
import time
from collections.abc import Mapping
from functools import cache
from secrets import token_hex
from typing import Any

from fastapi import FastAPI, Request
from opentelemetry.trace import Span
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overtone import __version__, errors, metrics
from overtone.logging import get_logger, is_enabled_for
from serve.auth import SESSION_COOKIE
from serve.batcher import Timing
from serve.encodings import MIN_GZIP_BYTES
from serve.erasure import ErasureRoutes
from serve.feedback import FeedbackRoutes
from serve.inference import InferenceRoutes
from serve.jobs import JobRoutes
from serve.models import ModelRoutes
from serve.openapi import ROUTES, describe
from serve.pages import PageRoutes
from serve.prediction import PredictionRoutes
from serve.problems import problem_response
from serve.service import TIMEOUT_HEADER, Handler, Service
from serve.sessions import SessionRoutes
from serve.tracing import trace_id

_SLOW_S = 1.0
"""A request that takes longer is logged; with LOG_LEVEL=DEBUG every request is."""
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
HOT_ROUTES = {("POST", "/predict"): "predict", ("POST", "/predict/batch"): "predict_batch"}
"""The routes that skip the framework, and their handlers."""
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
"""On every answer. The page's own policy of contents is in `serve.files`."""


def create_app(service: Service) -> ASGIApp:
    """The whole API over `service`."""
    handlers = _handlers(service)
    framework = _framework(service, handlers)
    packing = GZipMiddleware(framework, minimum_size=MIN_GZIP_BYTES, compresslevel=1)
    app: ASGIApp = _Dispatch(packing, {route: handlers[name] for route, name in HOT_ROUTES.items()})
    if service.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[
                service.gate.api_key_header,
                "Authorization",
                "Content-Type",
                "X-Request-ID",
                TIMEOUT_HEADER,
            ],
            expose_headers=["X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"],
        )
    return _Edge(app, service)


class _Edge:
    """Outermost: what every answer carries in its headers, and the request's count, duration and trace."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._gate = service.gate
        self._sends_id = service.sends_request_id
        self._tracing = service.tracing
        self._logs_all = is_enabled_for("DEBUG")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope["overtone.request_id"] = _request_id(scope)
        status = 0
        span = self._tracing.start(scope) if self._tracing is not None else None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *_SAFE_HEADERS, *self._gate.limit_headers(scope)]
                if self._sends_id:
                    headers.append((b"x-request-id", request_id))
                timing = scope.get("overtone.timing")
                if timing is not None:
                    headers.append((b"server-timing", _server_timing(timing)))
                message["headers"] = headers
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            method, route = scope["method"], _route(scope)
            if method not in _METHODS:
                method = "other"
            # 499: the client left before there was an answer.
            _request_counter(method, route, status or 499).inc()
            seconds = time.perf_counter() - started
            _duration(method, route).observe(seconds)
            if self._tracing is not None and span is not None:
                self._tracing.end(span, f"{method} {route}", status or 499, scope.get("overtone.timing"))
            if seconds >= _SLOW_S or status >= 500 or self._logs_all:
                _log(scope, f"{method} {route}", status or 499, seconds, span)


class _Dispatch:
    """Sends the hot routes straight to their handlers and all else to the framework."""

    def __init__(self, framework: ASGIApp, hot: Mapping[tuple[str, str], Handler]) -> None:
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


def _handlers(service: Service) -> dict[str, Handler]:
    """The handler of each route, by the name `ROUTES` gives it."""
    classes = (
        PredictionRoutes,
        InferenceRoutes,
        PageRoutes,
        SessionRoutes,
        ModelRoutes,
        ErasureRoutes,
        FeedbackRoutes,
        JobRoutes,
    )
    groups = [routes(service) for routes in classes]
    return {
        route.handler: next(getattr(g, route.handler) for g in groups if hasattr(g, route.handler)) for route in ROUTES
    }


def _framework(service: Service, handlers: Mapping[str, Handler]) -> FastAPI:
    app = FastAPI(title="Overtone", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_exception_handler(errors.OvertoneError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    for route in ROUTES:
        app.add_api_route(route.path, handlers[route.handler], **route.options())
    describe(app, api_key_header=service.gate.api_key_header, session_cookie=SESSION_COOKIE)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return problem_response(request, error)


def _log(scope: Scope, name: str, status: int, seconds: float, span: Span | None) -> None:
    logger = get_logger(request_id=scope["overtone.request_id"].decode("latin-1"), status=status)
    fields: dict[str, Any] = {"request": name, "duration_ms": round(seconds * 1000, 2)}
    if span is not None:
        fields["trace_id"] = trace_id(span)
    fields |= scope.get("overtone.prediction", {})
    tell = logger.warning if status >= 500 or seconds >= _SLOW_S else logger.debug
    tell("request.answered", **fields)


def _server_timing(timing: Timing) -> bytes:
    """How long each stage took, in ms, as browsers and proxies read it (W3C Server Timing)."""
    return ", ".join([f"{name};dur={(end - start) * 1000:.2f}" for name, start, end in timing.stages()]).encode()


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return bytes(value) if _REQUEST_ID.fullmatch(value) else token_hex(16).encode()
    return token_hex(16).encode()


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
