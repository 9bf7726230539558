"""What the handlers of the API are given, and the few things that all of them do."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from overtone.db.database import Database
from overtone.db.feedback import Feedback, Written
from overtone.erasure import Kind
from serve.auth import Gate
from serve.bodies import FieldError, invalid
from serve.classifier import Classifier
from serve.tracing import Tracing

TIMEOUT_HEADER = "X-Request-Timeout-S"
"""In how many seconds the caller needs the answer."""
MIN_TIMEOUT_S = 0.01
_TIMEOUT_HEADER = TIMEOUT_HEADER.lower().encode()
_SECONDS = re.compile(rb"(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,3})?")

UPLOADS_AT_ONCE = 2
"""In one replica: taking an upload apart costs the interpreter time that answers need."""

Handler = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")


class Records(Protocol):
    """What the routes ask of the database."""

    async def exchange_sign_in(self, token: str) -> str | None: ...
    async def create_session(self, key_id: str, until: datetime | None = None) -> str | None: ...
    async def end_session(self, session_id: str) -> None: ...
    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]: ...
    async def give_feedback(self, item: Feedback, *, key_id: str) -> Written | None: ...
    async def erase(self, kind: Kind, number: int, *, actor: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class JobDesk:
    """What the routes of jobs need beside the service."""

    open_database: Callable[[], Awaitable[Database]]
    root: Path
    """Folder of all jobs, which the consumers see too."""
    max_bytes: int = 4 * 2**30
    max_texts: int = 10_000_000
    max_open: int = 100
    """Jobs of an account that may be under way at once."""
    keep_days: int = 7
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS_AT_ONCE))


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need."""

    classifier: Classifier
    gate: Gate
    records: Records
    jobs: JobDesk | None = None
    """None: jobs are refused."""
    cors_origins: tuple[str, ...] = ()
    metrics_folder: Path | None = None
    sends_request_id: bool = True
    """False where the server in front has put an id on the request and will put it on the answer."""
    interactive_deadline_s: float = 30.0
    bulk_deadline_s: float = 600.0
    replica: str = ""
    """Which of the replicas answers."""
    tracing: Tracing | None = None

    def deadline_s(self, request: Request, *, is_bulk: bool) -> float:
        """Seconds in which the texts of `request` are to reach the engine: the caller's choice, up to the service's.

        Raises:
            InvalidInputError: the header that says it is no number, or less than `MIN_TIMEOUT_S`.
        """
        longest = self.bulk_deadline_s if is_bulk else self.interactive_deadline_s
        for name, value in request.scope["headers"]:
            if name == _TIMEOUT_HEADER:
                seconds = float(value) if _SECONDS.fullmatch(value) else 0.0
                if seconds < MIN_TIMEOUT_S:
                    raise invalid([FieldError(TIMEOUT_HEADER, f"must be a number of seconds from {MIN_TIMEOUT_S} up")])
                return min(seconds, longest)
        return longest


def json_response(value: Any, *, cached: bool = True) -> Response:
    """`value` as a JSON answer; with `cached` unset nobody on the way may keep it."""
    headers = None if cached else {"cache-control": "no-store"}
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")


async def while_there(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do `work` for as long as the client of `request`, whose body has been read, is there.

    Raises:
        ClientDisconnect: it left; `work` was cancelled.
    """
    current = asyncio.current_task()
    assert current is not None
    watch = asyncio.get_running_loop().create_task(_cancel_when_left(request.receive, current))
    try:
        return await work
    except asyncio.CancelledError:
        if not watch.done() or watch.cancelled():
            raise
        current.uncancel()
        raise ClientDisconnect from None
    finally:
        watch.cancel()


async def _cancel_when_left(receive: Receive, task: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
