"""Turning what people post into what PostgreSQL can hold. Pure functions."""

import json
import math
from datetime import datetime
from typing import Any

import orjson

from overtone.schema import Post
from overtone.text import storable

_INT64 = range(-(2**63), 2**63)


def is_int64(number: int) -> bool:
    """Whether a bigint column can hold `number`."""
    return number in _INT64


def json_text(value: Any) -> str:
    """`value` as JSON that a jsonb column takes: no NUL, no lone surrogate, no number that JSON lacks.

    Raises:
        ValueError: it is nested too deeply to be written down.
    """
    try:
        dumped = orjson.dumps(value)
    except TypeError:
        dumped = b"\\u0000"
    if b"\\u0000" not in dumped:
        return dumped.decode()
    try:
        return json.dumps(_clean(value), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("the payload is nested too deeply") from None


def raw_of(post: Post) -> bytes:
    """`post` as bytes for the dead letters: what cannot be encoded is escaped, a payload that cannot be is left out."""
    fields: dict[str, Any] = {
        "post_id": post.post_id,
        "author_id": post.author_id,
        "text": post.text,
        "created_at": post.created_at,
        "payload": post.payload,
    }
    try:
        return _escaped(fields)
    except (RecursionError, ValueError):
        return _escaped({**fields, "payload": None})


def _escaped(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, default=_plain, skipkeys=True).encode("ascii")


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return storable(_plain(value))
