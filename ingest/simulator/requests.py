"""What requests to the simulator carry."""

from datetime import UTC, datetime
from typing import Any

from aiohttp import web

LIMIT_HEADERS = web.RequestKey("limit_headers", dict[str, str])
"""Of a request that was let in: what its answer tells about the window of calls."""


async def json_of(request: web.Request) -> Any:
    """The body as JSON; None if it is not."""
    try:
        return await request.json()
    except ValueError:
        return None


def number_in(request: web.Request, name: str) -> int | None:
    """The number in the query under `name`, None where there is nothing.

    Raises:
        ValueError: it is no number.
    """
    value = request.query.get(name)
    return None if value is None else int(value)


def instant_of(value: str) -> datetime:
    """The instant that `value` writes in ISO 8601; UTC unless it says otherwise.

    Raises:
        ValueError: it is none.
    """
    instant = datetime.fromisoformat(value)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def wanted_fields(request: web.Request) -> tuple[frozenset[str], bool]:
    """The post fields that the client asks for, and whether it asks for users too."""
    fields = frozenset(request.query.get("tweet.fields", "").split(","))
    return fields, "author_id" in request.query.get("expansions", "").split(",")


def base36(number: int) -> str:
    """`number` (0 or more) in digits and letters."""
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[rest] + digits
    return digits or "0"
