"""Request bodies: read within their limit, parsed, and checked field by field.

Hand-written because it runs for every text. What is wrong is named by field, limit and size; the text is never
repeated.
"""

import asyncio
import json
import re
import types
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from overtone.errors import (
    InvalidInputError,
    MalformedError,
    TooLargeError,
    TooSlowError,
    UnsupportedMediaTypeError,
)
from overtone.schema import MAX_BATCH_TEXTS, MAX_TEXT_CHARS
from overtone.text import has_lone_surrogate
from serve.encodings import inflate, is_gzip

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_SMALL_BODY_BYTES = 64 * 1024
BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive, beyond the time for its size."""
SLOWEST_BYTES_PER_S = 1024 * 1024
"""How fast the rest of a large body must come."""
_MAX_SHOWN_ERRORS = 20
_JSON_TYPE = re.compile(rb"application/(?:[\w.+-]+\+)?json\s*(?:;|$)", re.IGNORECASE)
_CHARSET = re.compile(rb"charset\s*=\s*\"?([\w-]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that is wrong with a body."""

    field: str
    problem: str
    limit: int | None = None
    size: int | None = None


async def read_json(request: Request, *, max_bytes: int = MAX_BODY_BYTES, default: bytes = b"") -> Any:
    """The parsed body; `default`, if given, stands for one that is empty, of whatever type.

    Raises:
        UnsupportedMediaTypeError: the content type is not JSON in UTF-8.
        TooLargeError: the body is over `max_bytes`, whether or not its length was announced.
        TooSlowError: it did not arrive in time.
        MalformedError: not UTF-8 or not JSON.
    """
    announced = None
    media = encoding = b""
    for name, value in request.scope["headers"]:
        if name == b"content-length":
            announced = value
        elif name == b"content-type":
            media = value
        elif name == b"content-encoding":
            encoding = value
    if default:
        body = await read_bytes(request, announced, encoding, max_bytes)
        if not body:
            return parse_json(default)
        _check_media(media)
        return parse_json(body)
    _check_media(media)
    return parse_json(await read_bytes(request, announced, encoding, max_bytes))


async def read_bytes(request: Request, announced: bytes | None, encoding: bytes, max_bytes: int) -> bytes:
    """The body, unpacked, of a request with the headers Content-Length and Content-Encoding given.

    Raises:
        UnsupportedMediaTypeError: it is packed, and not with gzip.
        TooLargeError: it is over `max_bytes`, packed or unpacked, whether or not its length was announced.
        TooSlowError: it did not arrive within 30 s and one for each MiB announced, or allowed if none is.
        MalformedError: it is not the gzip data that it is said to be.
    """
    is_packed = bool(encoding) and is_gzip(encoding)
    # Eighteen digits are enough, and the conversion of very many is slow.
    size = int(announced[:18]) if announced is not None and announced[:18].isdigit() else None
    if size is not None and size > max_bytes:
        raise _too_large(max_bytes, size)
    body = await _read(request, max_bytes, size)
    return await inflate(body, max_bytes) if is_packed else body


def parse_json(body: bytes, what: str = "The body") -> Any:
    """`body`, which errors call `what`, as JSON.

    Raises:
        MalformedError: saying where it stops being UTF-8 or JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "surrogate" in str(error):
            return _parse_with_surrogates(body, what)
        where = f"line {error.lineno}, column {error.colno}"
        reason = "is not UTF-8" if "utf-8" in str(error).lower() else f"is not valid JSON at {where}"
        raise MalformedError(f"{what} {reason}.", errors=[FieldError("body", "not valid JSON")]) from None


def checked_text(text: Any) -> str:
    """`text`, if it keeps to the rules for one.

    Raises:
        InvalidInputError: naming the field, limit and size.
    """
    problem = text_problem(text)
    if problem is not None:
        raise invalid([problem])
    return text  # type: ignore[no-any-return]


def checked_texts(texts: Any, field: str = "texts") -> list[str]:
    """`texts`, if it is a list of texts and each keeps to the rules.

    Raises:
        InvalidInputError: naming each that is wrong, as a part of `field`, the first 20 of them.
    """
    if not isinstance(texts, list):
        raise invalid([FieldError(field, "must be a list of strings")])
    if not texts:
        raise invalid([FieldError(field, "must hold at least 1 text", 1, 0)])
    if len(texts) > MAX_BATCH_TEXTS:
        too_many = f"holds {len(texts)} texts, at most {MAX_BATCH_TEXTS} are allowed"
        raise invalid([FieldError(field, too_many, MAX_BATCH_TEXTS, len(texts))])
    problems: list[FieldError] = []
    for index, text in enumerate(texts):
        problem = text_problem(text)
        if problem is not None:
            problems.append(replace(problem, field=f"{field}[{index}]"))
            if len(problems) == _MAX_SHOWN_ERRORS:
                break
    if problems:
        raise invalid(problems)
    return texts


def text_problem(text: Any, field: str = "text") -> FieldError | None:  # noqa: PLR0911  (one return a rule)
    """What is wrong with `text`, or None."""
    if not isinstance(text, str):
        return FieldError(field, "must be a string")
    if not text:
        return FieldError(field, "must hold at least 1 character", 1, 0)
    if len(text) > MAX_TEXT_CHARS:
        problem = f"holds {len(text)} characters, at most {MAX_TEXT_CHARS} are allowed"
        return FieldError(field, problem, MAX_TEXT_CHARS, len(text))
    if text.isspace():
        return FieldError(field, "must hold more than white space", 1, 0)
    if "\0" in text:
        return FieldError(field, "must not hold the character NUL (U+0000)", 0, text.count("\0"))
    if not text.isascii() and has_lone_surrogate(text):
        return FieldError(field, "must not hold half of a surrogate pair (U+D800 to U+DFFF)", 0, 1)
    return None


def invalid(problems: list[FieldError]) -> InvalidInputError:
    """The exception for `problems`, of which there is at least one."""
    first = problems[0]
    more = f" ({len(problems) - 1} more in `errors`)" if len(problems) > 1 else ""
    return InvalidInputError(f"{first.field} {first.problem}{more}.", errors=problems)


def _check_media(media: bytes) -> None:
    charset = _CHARSET.search(media)
    if not _JSON_TYPE.match(media) or (charset and charset[1].lower() not in {b"utf-8", b"utf8", b"us-ascii"}):
        raise UnsupportedMediaTypeError("The header Content-Type must be application/json, in UTF-8.")


async def _read(request: Request, max_bytes: int, announced: int | None) -> bytes:
    first, rest = _begun(request.receive())
    # A body that is there already, as nearly all are, needs no timer.
    if first is not None and first["type"] == "http.request" and not first.get("more_body", False):
        body: bytes = first.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes, len(body))
        return body
    timeout_s = BODY_TIMEOUT_S + (max_bytes if announced is None else announced) / SLOWEST_BYTES_PER_S
    try:
        async with asyncio.timeout(timeout_s):
            return await _gathered(first or await rest, request.receive, max_bytes)
    except TimeoutError:
        raise TooSlowError(f"The body did not arrive within {timeout_s:.0f} s.") from None


async def _gathered(message: Message, receive: Callable[[], Awaitable[Message]], max_bytes: int) -> bytes:
    """The body that begins with `message`."""
    chunks: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes, size)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()


def _begun(receiving: Awaitable[Message]) -> tuple[Message | None, Awaitable[Message]]:
    """What `receiving` gives without waiting; if nothing, what is left of it to be awaited."""
    steps = receiving.__await__()
    try:
        awaited = next(steps)
    except StopIteration as there:
        return there.value, receiving
    return None, _rest(steps, awaited)


@types.coroutine
def _rest(steps: Generator[Any, Any, Message], awaited: Any) -> Generator[Any, Any, Message]:
    """What is left of an awaitable that was begun and waits for `awaited`."""
    try:
        yield awaited
    except BaseException:
        steps.close()
        raise
    return (yield from steps)


def _too_large(limit: int, size: int) -> TooLargeError:
    problem = FieldError("body", f"is over the limit of {limit} bytes", limit, size)
    return TooLargeError(f"The body is over the limit of {limit} bytes.", errors=[problem])


def _parse_with_surrogates(body: bytes, what: str) -> Any:
    """orjson refuses a lone surrogate without saying in which field; the standard library lets it through."""
    try:
        return json.loads(body, parse_int=_integer)
    except (ValueError, RecursionError):
        raise MalformedError(f"{what} is not valid JSON.", errors=[FieldError("body", "not valid JSON")]) from None


def _integer(digits: str) -> int | float:
    """As orjson reads it: what 64 bits may not hold is a float."""
    return int(digits) if len(digits) < 19 else float(digits)
