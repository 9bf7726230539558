"""The HTTP API as a client: texts in, predictions out, every failure sorted into what the caller can do about it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from overtone.errors import (
    InvalidInputError,
    OverloadedError,
    OvertoneError,
    UnauthorizedError,
    UnavailableError,
)
from overtone.schema import Prediction
from overtone.settings import Settings

_MAX_RETRY_AFTER_S = 30.0
_PASSING_CODES = frozenset({"overloaded", "deadline_exceeded", "unavailable", "shutting_down", "database_unavailable"})


@dataclass(frozen=True, slots=True)
class Refused:
    """The server will not classify this text, now or later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Postponed:
    """The server could not classify this text now."""

    reason: str


Outcome = Prediction | Refused | Postponed


class PredictClient:
    """`POST /predict/batch` at `base_url`. An async context manager."""

    def __init__(
        self,
        base_url: str,
        header: str,
        read_key: Callable[[], str],
        *,
        timeout_s: float = 60.0,
        fresh_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The key is read again every `fresh_s` seconds, and when it is refused."""
        self._url = f"{base_url}/predict/batch"
        self._header = header
        self._read_key = read_key
        self._key: str | None = None
        self._key_read_at = 0.0
        self._fresh_s = fresh_s
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5.0)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def predict(self, texts: Sequence[str]) -> list[Outcome]:
        """One outcome a text, in order.

        Raises:
            InvalidInputError: the server refuses the request as a whole; one text or more is to blame.
            UnauthorizedError: the key is not taken; it is read anew for the next call.
            OverloadedError, UnavailableError: not now.
        """
        if self._session is None:
            raise UnavailableError("the client is not open")
        try:
            headers = {self._header: self._current_key(), "Content-Type": "application/json"}
            body = orjson.dumps({"texts": list(texts)})
            async with self._session.post(self._url, data=body, headers=headers) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(f"the API at {self._url} cannot be reached: {type(error).__name__}") from error
        if response.status != 200:
            if response.status in (401, 403):
                self._key = None
            raise failure_of(response.status, response.headers.get("Retry-After"), body)
        return outcomes_of(body, len(texts))

    def _current_key(self) -> str:
        now = self._clock()
        if self._key is None or now - self._key_read_at >= self._fresh_s:
            try:
                self._key = self._read_key()
            except UnauthorizedError:
                if self._key is None:
                    raise
            self._key_read_at = now
        return self._key


def client_for(settings: Settings, timeout_s: float, latest: Callable[[], Settings] | None = None) -> PredictClient:
    """The client of the API that `settings` describe, with the key of the `latest` ones."""
    newest = latest or (lambda: settings)
    return PredictClient(
        settings.api_url,
        settings.api_key_header,
        lambda: newest().read_api_key(),
        timeout_s=timeout_s,
        fresh_s=settings.secrets_refresh_s,
    )


def failure_of(status: int, retry_after: str | None, body: bytes) -> OvertoneError:
    """The exception for an answer other than 200."""
    detail = _detail(body)
    if status in (401, 403):
        return UnauthorizedError(f"the API refuses the key ({status}): {detail}")
    if status in (400, 413, 422):
        return InvalidInputError(f"the API refuses the texts ({status}): {detail}", status=status)
    if status == 429:
        return OverloadedError(f"the API is full: {detail}", retry_after_s=_seconds(retry_after))
    return UnavailableError(f"the API answers {status}: {detail}", status=status, retry_after_s=_seconds(retry_after))


def outcomes_of(body: bytes, count: int) -> list[Outcome]:
    """The outcomes in the answer `body` to a request of `count` texts.

    Raises:
        UnavailableError: the body is not an answer of our API.
    """
    try:
        answer = orjson.loads(body)
        version = str(answer["model_version"])
        outcomes = [_outcome(item, version) for item in answer["predictions"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError(f"the API's answer cannot be read: {type(error).__name__}") from error
    if len(outcomes) != count:
        raise UnavailableError(f"the API answered {len(outcomes)} of {count} texts")
    return outcomes


def _outcome(item: dict[str, Any], version: str) -> Outcome:
    problem = item.get("error")
    if problem is None:
        scores = {str(label): float(score) for label, score in item["scores"].items()}
        return Prediction(
            label=str(item["label"]),
            confidence=float(item["confidence"]),
            scores=scores,
            model_version=str(item.get("model_version") or version),
        )
    code = str(problem.get("code") or "refused")
    return Postponed(code) if code in _PASSING_CODES else Refused(code)


def _detail(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return "no detail given"


def _seconds(value: str | None) -> float:
    try:
        return min(max(float(value or 0), 0.0), _MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0
