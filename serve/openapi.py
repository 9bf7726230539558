"""The routes of the API and what OpenAPI tells of them."""

from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve import wire
from serve.longtext import LONG_TEXT_POLICIES
from serve.service import MIN_TIMEOUT_S, TIMEOUT_HEADER

_JSON = "application/json"
_PROBLEM_JSON = "application/problem+json"
_NDJSON = "application/x-ndjson"
_REF = "#/components/schemas/{model}"
_GUARDED = (401, 403, 429, 503)
_TAKING = (400, 408, 413, 415, 422, 500, 504, *_GUARDED)
_LINES_IN = '{"text": "I love this"}\n"worst service ever"\n'
_LINES_OUT = (
    '{"label": "positive", "confidence": 0.98, "scores": {...}, "model_version": "..."}\n'
    '{"error": {"status": 422, ...}, "line": 2}\n'
)
_NAMES = {
    "name": "overtone",
    "version": "default-0123abcd",
    "post_id": "1780000000000000000",
    "author_id": "1500000042",
    "job_id": "3f1c2f9e-6f0f-4a55-9a43-0d0c6f1b7a11",
}
_PACKED = {
    "name": "Content-Encoding",
    "in": "header",
    "description": "gzip, where the body is packed.",
    "schema": {"type": "string", "enum": ["gzip", "identity"]},
}
_TIMEOUT = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "Seconds in which the texts must reach the engine, else 504; at most what the service allows. Of a "
    "streamed batch: each chunk of lines.",
    "schema": {"type": "number", "minimum": MIN_TIMEOUT_S, "maximum": 1_000_000},
    "example": 2.5,
}
_UPLOADS = {
    _NDJSON: '{"text": "I love this", "id": "a-1"}\n"worst service ever"\n',
    "text/csv": "id,text\na-1,I love this\na-2,worst service ever\n",
    "text/tab-separated-values": "id\ttext\na-1\tI love this\n",
}
_ONCE = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Names the request: sent again with the same key, it makes no second job.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
}


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
    classifies: bool = False
    """Whether it classifies texts: its body may be gzip, and it has a deadline."""
    streams: bool = False
    """Whether it takes and gives lines of JSON too."""
    content: str = _JSON
    """The media type of an answer without a model."""
    uploads: bool = False
    """Whether its body is a file of many texts."""
    needs_body: bool = True
    """Whether a body that has a model must be there."""
    makes_job: bool = False
    """Whether it makes a job, once for each idempotency key."""

    def options(self) -> dict[str, Any]:
        """What `FastAPI.add_api_route` takes."""
        done: dict[str, Any] = {"description": self.summary}
        if self.answer is not None:
            done["model"] = self.answer
        elif self.content != _JSON:
            done["content"] = {self.content: {"schema": {"type": "string"}}}
        if self.streams:
            done["content"] = {_NDJSON: {"schema": {"type": "string", "examples": [_LINES_OUT]}}}
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
            content: dict[str, Any] = {_JSON: {"schema": {"$ref": _REF.format(model=self.body.__name__)}}}
            if self.streams:
                content[_NDJSON] = {"schema": {"type": "string", "examples": [_LINES_IN]}}
            extra["requestBody"] = {"required": self.needs_body, "content": content}
        if self.uploads:
            kinds = {name: {"schema": {"type": "string", "examples": [text]}} for name, text in _UPLOADS.items()}
            extra["requestBody"] = {"required": True, "content": kinds}
        parameters: list[dict[str, Any]] = [
            {"name": item.name, "in": "query", "description": item.description, "schema": item.schema}
            for item in self.query
        ]
        parameters += [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": _NAMES[name]}
            for name in _NAMES
            if f"{{{name}}}" in self.path
        ]
        if self.classifies:
            parameters += [_PACKED, _TIMEOUT]
        if self.uploads:
            parameters.append(_PACKED)
        if self.makes_job:
            parameters.append(_ONCE)
        if parameters:
            extra["parameters"] = parameters
        if self.is_open:
            extra["security"] = []
        return extra


_MINUTES = Query("minutes", "Minutes of the series.", {"type": "integer", "minimum": 1, "maximum": 1440, "default": 30})
_NEWEST = Query("newest", "Newest posts to show.", {"type": "integer", "minimum": 0, "maximum": 200, "default": 50})
_TOKEN = Query("token", "The one-time token.", {"type": "string"})


def _v2(path: str, handler: str, summary: str, answer: type[BaseModel], **more: Any) -> Route:
    return Route("GET", f"/v2{path}", handler, "inference v2", summary, answer=answer, **more)


_INFER = Route(
    "POST",
    "/v2/models/{name}/infer",
    "v2_infer",
    "inference v2",
    "Classify texts, as tensors",
    body=wire.InferenceRequest,
    answer=wire.InferenceResponse,
    problems=(404, *_TAKING),
    classifies=True,
)
_V2 = (
    _v2("", "v2_server", "What the server is", wire.ServerMetadata, problems=_GUARDED),
    _v2("/health/live", "v2_live", "Whether the server lives", wire.Liveness, is_open=True),
    _v2("/health/ready", "v2_ready", "Whether the model is ready", wire.Readiness, is_open=True, problems=(503,)),
    *(
        route
        for version in ("", "/versions/{version}")
        for route in (
            _v2(
                f"/models/{{name}}{version}",
                "v2_model",
                "What the model takes and gives",
                wire.ModelMetadata,
                problems=(404, *_GUARDED),
            ),
            _v2(
                f"/models/{{name}}{version}/ready",
                "v2_model_ready",
                "Whether the model is ready",
                wire.Readiness,
                problems=(404, 503),
                is_open=True,
            ),
            replace(_INFER, path=f"/v2/models/{{name}}{version}/infer"),
        )
    ),
)
"""The Open Inference Protocol v2."""

_OPTIONS = (
    Query("top_k", "As in the body.", {"type": "integer", "minimum": 1}),
    Query("threshold", "As in the body.", {"type": "number", "minimum": 0, "maximum": 1}),
    Query("long_text", "As in the body.", {"type": "string", "enum": list(LONG_TEXT_POLICIES)}),
    Query("explain", "As in the body; not for streamed batches.", {"type": "boolean"}),
)

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
        classifies=True,
    ),
    Route(
        "POST",
        "/predict/batch",
        "predict_batch",
        "predictions",
        "Classify up to 10,000 texts, or any number of them line by line",
        body=wire.BatchRequest,
        answer=wire.BatchResponse,
        problems=_TAKING,
        query=_OPTIONS,
        classifies=True,
        streams=True,
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
    Route(
        "POST",
        "/feedback",
        "give_feedback",
        "stored",
        "Say what a label should be; needs the scope feedback",
        body=wire.FeedbackRequest,
        answer=wire.FeedbackReceipt,
        problems=(404, 400, 408, 413, 415, 422, *_GUARDED),
    ),
    *(
        Route(
            "DELETE",
            f"/{kind}s/{{{kind}_id}}",
            f"erase_{kind}",
            "stored",
            summary,
            answer=wire.Receipt,
            problems=(422, *_GUARDED),
        )
        for kind, summary in (
            ("post", "Erase a post and its edits, for good; needs the scope admin"),
            ("author", "Erase an author's posts, and store none of theirs again; needs the scope admin"),
        )
    ),
    Route(
        "POST",
        "/jobs",
        "submit_job",
        "jobs",
        "Classify a file of any number of texts in the background",
        answer=wire.Job,
        status=202,
        problems=(400, 408, 413, 415, 422, *_GUARDED),
        query=(
            Query("column", "Field or column that holds the text.", {"type": "string", "default": "text"}),
            Query(
                "invalid",
                "`keep`: a line that is wrong gets an error in the result; `reject`: it refuses the upload.",
                {"type": "string", "enum": ["keep", "reject"], "default": "keep"},
            ),
            *_OPTIONS[:3],
        ),
        uploads=True,
        makes_job=True,
    ),
    Route(
        "POST",
        "/jobs/retention",
        "submit_retention",
        "jobs",
        "Apply the retention limits in the background; needs the scope admin",
        answer=wire.Job,
        status=202,
        problems=(422, *_GUARDED),
        makes_job=True,
    ),
    Route(
        "POST",
        "/jobs/erasure",
        "submit_erasure",
        "jobs",
        "Erase a post or an author in the background; needs the scope admin",
        body=wire.ErasureRequest,
        answer=wire.Job,
        status=202,
        problems=(400, 408, 413, 415, 422, *_GUARDED),
        makes_job=True,
    ),
    *(
        Route(
            "POST",
            f"/jobs/{name}",
            f"submit_{name}",
            "jobs",
            f"{summary}, in the background; needs the scope admin",
            body=body,
            answer=wire.Job,
            status=202,
            problems=(400, 408, 413, 415, 422, *_GUARDED),
            needs_body=False,
            makes_job=True,
        )
        for name, summary, body in (
            ("rescoring", "Give stored posts predictions by the model that is served now", wire.RescoringRequest),
            ("report", "Report what happened in the last days, in numbers", wire.ReportRequest),
        )
    ),
    Route(
        "GET",
        "/jobs",
        "list_jobs",
        "jobs",
        "The newest jobs of the key; of all keys for one with the scope admin",
        answer=wire.Jobs,
        problems=(422, *_GUARDED),
        query=(Query("limit", "How many.", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 50}),),
    ),
    Route(
        "GET",
        "/jobs/{job_id}",
        "show_job",
        "jobs",
        "How far a job is",
        answer=wire.Job,
        problems=(404, 422, *_GUARDED),
    ),
    Route(
        "GET",
        "/jobs/{job_id}/result",
        "job_result",
        "jobs",
        "A line for each line of the upload, when the job has ended",
        content=_NDJSON,
        problems=(404, 409, 422, *_GUARDED),
    ),
    Route(
        "POST",
        "/jobs/{job_id}/cancel",
        "cancel_job",
        "jobs",
        "End a job; what is done of it can be fetched",
        answer=wire.Job,
        problems=(404, 422, *_GUARDED),
    ),
    Route(
        "POST",
        "/jobs/{job_id}/resume",
        "resume_job",
        "jobs",
        "Go on with a job that has failed, where it stopped",
        answer=wire.Job,
        problems=(404, 422, *_GUARDED),
    ),
    Route(
        "DELETE",
        "/jobs/{job_id}",
        "delete_job",
        "jobs",
        "End a job and forget it and its result",
        status=204,
        problems=(404, 422, *_GUARDED),
    ),
    Route(
        "GET",
        "/models",
        "models",
        "models",
        "The bundles that the replica serves, and how a challenger does",
        answer=wire.Models,
        problems=_GUARDED,
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
    Route(
        "GET",
        "/metrics",
        "metrics",
        "state",
        "Metrics of all replicas of this machine",
        is_open=True,
        content="text/plain",
    ),
    *_V2,
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
        problems=(400, 408, 413, 415, 422, *_GUARDED),
        is_open=True,
    ),
    Route("DELETE", "/session", "end_session", "session", "Sign out", status=204, problems=(429, 503), is_open=True),
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
    models: list[type[BaseModel]] = [wire.Problem, *(route.body for route in ROUTES if route.body is not None)]
    for model in models:
        described = model.model_json_schema(ref_template=_REF)
        components.setdefault("schemas", {}).update(described.pop("$defs", {}) | {model.__name__: described})
    components["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": api_key_header},
        "bearer": {"type": "http", "scheme": "bearer"},
        "session": {"type": "apiKey", "in": "cookie", "name": session_cookie},
    }
    schema["security"] = [{"key": []}, {"bearer": []}, {"session": []}]
    return schema
