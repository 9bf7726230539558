"""The routes of the API and what OpenAPI tells of them."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve import wire

_JSON = "application/json"
_PROBLEM_JSON = "application/problem+json"
_GUARDED = (401, 403, 503)
_TAKING = (400, 413, 415, 422, 429, 500, 504, *_GUARDED)


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter of the address."""

    name: str
    description: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    handler: str
    tag: str
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    status: int = 200
    problems: tuple[int, ...] = ()
    query: tuple[Query, ...] = ()
    is_open: bool = False
    """Whether it needs neither key nor session."""
    is_shown: bool = True

    def options(self) -> dict[str, Any]:
        """What `FastAPI.add_api_route` takes."""
        done: dict[str, Any] = {"description": self.summary}
        if self.answer is not None:
            done["model"] = self.answer
        responses: dict[int | str, dict[str, Any]] = {self.status: done}
        for status in self.problems:
            content = {_PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
            responses[status] = {"description": HTTPStatus(status).phrase, "content": content}
        return {
            "methods": [self.method],
            "summary": self.summary,
            "tags": [self.tag],
            "status_code": self.status,
            "responses": responses,
            "response_model": None,
            "include_in_schema": self.is_shown,
            "openapi_extra": self._extra(),
        }

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.body is not None:
            content = {_JSON: {"schema": self.body.model_json_schema()}}
            extra["requestBody"] = {"required": True, "content": content}
        if self.query:
            extra["parameters"] = [
                {"name": item.name, "in": "query", "description": item.description, "schema": item.schema}
                for item in self.query
            ]
        if self.is_open:
            extra["security"] = []
        return extra


_MINUTES = Query("minutes", "Minutes of the series.", {"type": "integer", "minimum": 1, "maximum": 1440, "default": 30})
_NEWEST = Query("newest", "Newest posts to show.", {"type": "integer", "minimum": 0, "maximum": 200, "default": 50})
_TOKEN = Query("token", "The one-time token.", {"type": "string"})

ROUTES = (
    Route(
        "POST",
        "/predict",
        "predict",
        "predictions",
        "Classify one text",
        body=wire.PredictRequest,
        answer=wire.Prediction,
        problems=_TAKING,
    ),
    Route(
        "POST",
        "/predict/batch",
        "predict_batch",
        "predictions",
        "Classify up to 10,000 texts",
        body=wire.BatchRequest,
        answer=wire.BatchResponse,
        problems=_TAKING,
    ),
    Route(
        "GET",
        "/stats",
        "stats",
        "stored",
        "Figures of what is stored",
        answer=wire.Stats,
        problems=(422, *_GUARDED),
        query=(_MINUTES, _NEWEST),
    ),
    Route("GET", "/health", "health", "state", "Whether the replica lives", answer=wire.Status, is_open=True),
    Route(
        "GET",
        "/ready",
        "ready",
        "state",
        "Whether the model is loaded and checked",
        answer=wire.Status,
        problems=(503,),
        is_open=True,
    ),
    Route("GET", "/metrics", "metrics", "state", "Metrics of all replicas of this machine", is_open=True),
    Route(
        "GET",
        "/sign-in",
        "sign_in",
        "session",
        "Exchange a one-time token for a session cookie",
        status=303,
        problems=(401, 503),
        query=(_TOKEN,),
        is_open=True,
    ),
    Route("GET", "/session", "session", "session", "Whether the browser is signed in", status=204, problems=_GUARDED),
    Route(
        "POST",
        "/session",
        "start_session",
        "session",
        "Exchange an API key for a session cookie",
        body=wire.SessionRequest,
        status=204,
        problems=(400, 415, 422, *_GUARDED),
        is_open=True,
    ),
    Route("DELETE", "/session", "end_session", "session", "Sign out", status=204, problems=(401, 503)),
    Route("GET", "/", "page", "page", "The page", is_open=True, is_shown=False),
    Route("GET", "/docs", "docs", "page", "This documentation", is_open=True, is_shown=False),
    Route("GET", "/static/{path:path}", "static", "page", "A file of the page", is_open=True, is_shown=False),
)


def describe(app: FastAPI, *, api_key_header: str, session_cookie: str) -> None:
    """Have `app` tell in its schema what FastAPI cannot know: how callers are known, and what errors look like."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, api_key_header, session_cookie)
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _schema(app: FastAPI, api_key_header: str, session_cookie: str) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title,
        version=app.version,
        routes=app.routes,
        description="Sentiment of short texts and of posts on X.",
    )
    components = schema.setdefault("components", {})
    problem = wire.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components.setdefault("schemas", {}).update(problem.pop("$defs", {}) | {"Problem": problem})
    components["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": api_key_header},
        "bearer": {"type": "http", "scheme": "bearer"},
        "session": {"type": "apiKey", "in": "cookie", "name": session_cookie},
    }
    schema["security"] = [{"key": []}, {"bearer": []}, {"session": []}]
    return schema
