"""Errors as HTTP problems (RFC 9457): the only place that assigns statuses."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from overtone import errors, metrics
from overtone.logging import get_logger
from serve.bodies import FieldError
from serve.haproxy import QUEUE_HEADER

STATUS: Mapping[type[errors.OvertoneError], int] = {
    errors.OvertoneError: 500,
    errors.InvalidInputError: 422,
    errors.MalformedError: 400,
    errors.TooSlowError: 408,
    errors.TooLargeError: 413,
    errors.UnsupportedMediaTypeError: 415,
    errors.UnauthorizedError: 401,
    errors.ForbiddenError: 403,
    errors.NotFoundError: 404,
    errors.NotReadyError: 409,
    errors.OverloadedError: 429,
    errors.DeadlineExceededError: 504,
    errors.UnavailableError: 503,
    errors.EngineError: 500,
}
"""The status of each class of error, or of the nearest class above it."""

_PROBLEM_JSON = "application/problem+json"


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
    described = {
        "type": f"urn:overtone:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request.scope.get("overtone.request_id", b"").decode("latin-1"),
        "errors": [asdict(item) for item in details.get("errors", ()) if isinstance(item, FieldError)],
    }
    # What clients of the Open Inference Protocol look for.
    return described | {"error": detail} if request.scope.get("path", "").startswith("/v2") else described


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
    if status == 408:
        headers["connection"] = "close"  # the rest of the body may still be on its way
    if status in {429, 503}:
        retry_after_s = error.retry_after_s if isinstance(error, errors.OverloadedError) else 1.0
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        metrics.REFUSED.labels(body["code"]).inc()
        if isinstance(error, errors.OverloadedError) and error.is_for_all:
            headers[QUEUE_HEADER] = "full"
    return Response(orjson.dumps(body), status, headers, _PROBLEM_JSON)


def status_of(error: errors.OvertoneError) -> int:
    """The HTTP status of `error`."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
