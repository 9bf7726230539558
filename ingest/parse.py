"""One line of the stream, or one post of a search, into what the pipeline works with. Pure; never raises."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from overtone.schema import Post, snowflake_to_datetime
from overtone.text import storable

_MAX_POST_ID = 2**63 - 1
_MAX_TAG_CHARS = 200
_MAX_TITLE_CHARS = 200
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """An empty line: the X API has nothing to send and is still there."""


@dataclass(frozen=True, slots=True)
class StreamProblem:
    """The X API says inside the stream that something is wrong, usually just before it hangs up."""

    title: str
    detail: str
    kind: str
    """The last part of the problem's `type`, such as `operational-disconnect`."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A line that holds no post that could be stored."""

    raw: bytes
    reason: str
    """Short and stable: a label of a metric."""


Parsed = Post | KeepAlive | StreamProblem | Bad


def parse_line(raw: bytes) -> Parsed:
    """What the line `raw` says, whatever its bytes are."""
    if not raw.strip():
        return KeepAlive()
    try:
        message = _decode(raw)
    except (ValueError, RecursionError):
        return Bad(raw, "not_json")
    said = _said_by(message) if isinstance(message, dict) else "not_an_object"
    return Bad(raw, said) if isinstance(said, str) else said


def post_of(message: dict[str, Any]) -> Post | str:
    """The post in `message` (an object with `data`), or in one word why it cannot be stored."""
    data = message["data"]
    post_id = _whole_number(data.get("id"))
    if post_id is None or not 0 < post_id <= _MAX_POST_ID:
        return "no_post_id"
    text = _full_text(data)
    if text is None:
        return "no_text"
    lang = data.get("lang")
    return Post(
        post_id=post_id,
        author_id=_author_id(data),
        text=storable(text),
        created_at=_instant(data.get("created_at")) or snowflake_to_datetime(post_id),
        lang=lang if isinstance(lang, str) else None,
        rule_tags=message_tags(message),
        payload=message,
    )


def _said_by(message: dict[str, Any]) -> Post | StreamProblem | str:
    if isinstance(message.get("data"), dict):
        return post_of(message)
    if message.get("errors"):
        return _problem_of(message["errors"])
    if "title" in message and "type" in message:
        return _problem_of([message])
    return "unknown_message"


def messages_of_search(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The posts of a recent-search answer, each in the form in which the stream would have sent it."""
    users = {str(user.get("id")): user for user in _objects(_object(answer.get("includes")).get("users"))}
    messages = []
    for data in _objects(answer.get("data")):
        message: dict[str, Any] = {"data": data}
        author = users.get(str(data.get("author_id")))
        if author is not None:
            message["includes"] = {"users": [author]}
        messages.append(message)
    return messages


def _decode(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        # It refuses lone surrogates; the standard library lets them through; they are replaced before storing.
        if _SURROGATE_ESCAPE.search(raw) is None:
            raise
        return json.loads(raw, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _problem_of(errors: Any) -> StreamProblem:
    first = next(iter(_objects(errors)), {})
    title = str(first.get("title") or first.get("message") or "error")[:_MAX_TITLE_CHARS]
    kind = str(first.get("type") or "").rstrip("/").rpartition("/")[2][:_MAX_TITLE_CHARS]
    return StreamProblem(title=title, detail=str(first.get("detail") or ""), kind=kind or title)


def _full_text(data: dict[str, Any]) -> str | None:
    for name in ("note_tweet", "note_post"):
        note = data.get(name)
        if isinstance(note, dict) and isinstance(note.get("text"), str) and note["text"]:
            return str(note["text"])
    text = data.get("text")
    return text if isinstance(text, str) else None


def _author_id(data: dict[str, Any]) -> int:
    """The author's id, or 0 where the X API was not asked for it."""
    author_id = _whole_number(data.get("author_id"))
    return author_id if author_id is not None and 0 <= author_id <= _MAX_POST_ID else 0


def _whole_number(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _instant(value: Any) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        instant = datetime.fromisoformat(value)
        return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def message_tags(message: dict[str, Any]) -> tuple[str, ...]:
    """The tags of the rules that `message` matched, each once, fit for a column and for the label of a metric."""
    tags = (rule.get("tag") for rule in _objects(message.get("matching_rules")))
    return tuple(dict.fromkeys(_tag(tag) for tag in tags if isinstance(tag, str) and tag))


@lru_cache(4096)  # a stream has few rules and many posts
def _tag(tag: str) -> str:
    return storable(tag)[:_MAX_TAG_CHARS]


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
