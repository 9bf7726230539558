"""What the handlers of the API are given, and the few things that all of them do."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
from fastapi import Request
from starlette.responses import Response

from serve.auth import Gate
from serve.classifier import Classifier

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
    gate: Gate
    records: Records
    cors_origins: tuple[str, ...] = ()
    metrics_folder: Path | None = None
    sends_request_id: bool = True
    """False where the server in front has put an id on the request and will put it on the answer."""
    interactive_deadline_s: float = 30.0
    bulk_deadline_s: float = 600.0


def json_response(value: Any, *, cached: bool = True) -> Response:
    """`value` as a JSON answer; with `cached` unset nobody on the way may keep it."""
    headers = None if cached else {"cache-control": "no-store"}
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")
