"""Doing what X says about stored posts: by its compliance streams, or by asking about all of them in batch jobs."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import aiohttp
import orjson

from ingest.backoff import Backoff, ConnectBudget, Failure
from ingest.options import ComplianceOptions
from ingest.waiting import until_it_works
from overtone import metrics
from overtone.db.erasure import scrub_places, scrub_posts, versions_of
from overtone.db.posts import cursor, stored_ids, touch_cursor
from overtone.db.tombstones import admit_authors, admit_posts
from overtone.erasure import Eraser
from overtone.errors import OvertoneError, StreamError, UnavailableError
from overtone.logging import get_logger

_STALL_S = 25.0
_STABLE_S = 30.0
"""A connection that lasted this long was good: the waits start over."""
_CONNECTS_PER_WINDOW = 100
"""To all partitions of one compliance stream, in 15 minutes."""
_MAX_EVENTS = 1_000
_MAX_BACKFILL = timedelta(minutes=5)
_FAILED_SWEEP_WAIT_S = 900.0
_TOUCH_EVERY_S = 10.0

_log = get_logger()

What = Literal["erase_post", "admit_post", "scrub_post", "erase_author", "admit_author", "scrub_author"]

_OF_POST: Mapping[str, tuple[What, str]] = {
    "delete": ("erase_post", "deleted"),
    "drop": ("erase_post", "dropped"),
    "undrop": ("admit_post", "dropped"),
    "withheld": ("erase_post", "withheld"),
}
_OF_USER: Mapping[str, tuple[What, str]] = {
    "user_delete": ("erase_author", "deactivated"),
    "user_undelete": ("admit_author", "deactivated"),
    "user_protect": ("erase_author", "protected"),
    "user_unprotect": ("admit_author", "protected"),
    "user_suspend": ("erase_author", "suspended"),
    "user_unsuspend": ("admit_author", "suspended"),
    "user_withheld": ("erase_author", "withheld"),
    "scrub_geo": ("scrub_author", "scrub_geo"),
}


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do to what is stored."""

    what: What
    number: int
    """Id of the post or author."""
    reason: str
    author_id: int | None = None
    """Of a post, where it is known."""
    up_to_post_id: int = 2**63 - 1
    """The last post that a `scrub_author` concerns."""


def actions_of(line: bytes) -> list[Action]:
    """What a line of a compliance stream asks for; nothing for a keep-alive or an event that changes nothing here.

    Raises:
        ValueError: the line cannot be read.
    """
    if not line.strip():
        return []
    try:
        data = orjson.loads(line)["data"]
        return [action for kind, about in data.items() for action in _actions(kind, about)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no compliance event: {type(error).__name__}") from error


def actions_of_job(answer: bytes) -> list[Action]:
    """What the result of a batch job about posts asks for, one JSON object a line.

    Raises:
        ValueError: a line cannot be read.
    """
    found = []
    try:
        for line in answer.splitlines():
            if line.strip():
                item = orjson.loads(line)
                reason = str(item.get("reason") or "deleted")
                what: What = "scrub_post" if reason == "scrub_geo" else "erase_post"
                found.append(Action(what, int(item["id"]), reason))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no result of a compliance job: {type(error).__name__}") from error
    return found


class Enforcer:
    """Does actions to one installation, many at a time, in their order."""

    def __init__(self, eraser: Eraser) -> None:
        self._eraser = eraser
        self._db = eraser.db

    async def enforce(self, actions: Sequence[Action]) -> None:
        """Do all `actions`. May be repeated.

        Raises:
            DatabaseUnavailableError: not all is done.
        """
        start = 0
        for end in range(1, len(actions) + 1):
            first = actions[start]
            if end == len(actions) or (actions[end].what, actions[end].reason) != (first.what, first.reason):
                await self._enforce_alike(first, actions[start:end])
                metrics.COMPLIANCE_ACTIONS.labels(first.what).inc(end - start)
                _log.info("compliance.enforced", what=first.what, reason=first.reason, count=end - start)
                start = end

    async def _enforce_alike(self, first: Action, actions: Sequence[Action]) -> None:
        numbers, reason = [action.number for action in actions], first.reason
        match first.what:
            case "erase_post":
                versions = [await versions_of(self._db, one.number, one.author_id) for one in actions]
                if reason == "edited":
                    versions = [[number] for number in numbers]
                await self._eraser.remove(sorted({one for chain in versions for one in chain}), (), reason=reason)
            case "admit_post":
                await admit_posts(self._db, numbers, reason=reason)
            case "scrub_post":
                await scrub_posts(self._db, numbers)
            case "erase_author":
                await self._eraser.remove((), numbers, reason=reason)
            case "admit_author":
                await admit_authors(self._db, numbers, reason=reason)
            case "scrub_author":
                for action in actions:
                    await scrub_places(self._db, [action.number], up_to_post_id=action.up_to_post_id)


@dataclass(slots=True)
class SweepResult:
    """What a sweep found."""

    asked: int = 0
    """Posts asked about."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many must go, by X's reason."""


class ComplianceApi:
    """X's compliance calls at `base_url`. An async context manager."""

    def __init__(self, base_url: str, token: str) -> None:
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    def use_token(self, token: str) -> None:
        """Ask with `token` from now on."""
        self._headers = {"Authorization": f"Bearer {token}"}

    async def __aenter__(self) -> "ComplianceApi":
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=_STALL_S)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=2**20)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def create_job(self) -> dict[str, Any]:
        """A new job about posts.

        Raises:
            StreamError: X cannot be reached or refuses.
        """
        return await self._json("POST", "/2/compliance/jobs", json={"type": "tweets", "name": "overtone sweep"})

    async def job(self, job_id: str) -> dict[str, Any]:
        """The job of this id as it is now. Raises as `create_job`."""
        return await self._json("GET", f"/2/compliance/jobs/{job_id}")

    async def upload(self, url: str, ids: Sequence[int]) -> None:
        """Give a job its ids. Raises as `create_job`."""
        body = "".join(f"{one}\n" for one in ids).encode()
        # The address is signed for this upload; it takes no token.
        await self._call("PUT", url, data=body, headers={"Content-Type": "text/plain"})

    async def download(self, url: str) -> bytes:
        """The result of a job. Raises as `create_job`."""
        return await self._call("GET", url, headers={})

    def events(self, path: str, parameters: Mapping[str, str]) -> Any:
        """The compliance stream at `path`, to be entered as an aiohttp response."""
        assert self._session is not None
        return self._session.get(f"{self._base_url}{path}", params=parameters, headers=self._headers)

    async def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        body = await self._call(method, f"{self._base_url}{path}", headers=self._headers, **arguments)
        try:
            found: dict[str, Any] = orjson.loads(body)["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise StreamError("the X API's answer about a compliance job cannot be read") from error
        return found

    async def _call(self, method: str, url: str, **arguments: Any) -> bytes:
        assert self._session is not None
        try:
            async with self._session.request(method, url, **arguments) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise StreamError(f"the X API cannot be reached: {type(error).__name__}") from error
        if response.status >= 300:
            raise StreamError(f"the X API answers {response.status} to a compliance call", status=response.status)
        return body


async def sweep(api: ComplianceApi, enforcer: Enforcer, eraser: Eraser, options: ComplianceOptions) -> SweepResult:
    """Ask X about every stored post, and remove what it says.

    Raises:
        StreamError: X cannot be reached, refuses, or fails a job. What was answered before is done.
        DatabaseUnavailableError: the database is away.
    """
    result, last = SweepResult(), 0
    while ids := await stored_ids(eraser.db, after_post_id=last, limit=options.ids_per_job):
        actions = actions_of_job(await _ask(api, ids, options))
        await enforcer.enforce(sorted(actions, key=lambda action: (action.what, action.reason)))
        result.asked += len(ids)
        for action in actions:
            result.reasons[action.reason] = result.reasons.get(action.reason, 0) + 1
        last = ids[-1]
    _log.info("compliance.swept", asked=result.asked, removed=result.reasons)
    return result


async def _ask(api: ComplianceApi, ids: Sequence[int], options: ComplianceOptions) -> bytes:
    job = await api.create_job()
    await api.upload(job["upload_url"], ids)
    deadline = time.monotonic() + options.job_timeout_s
    while time.monotonic() < deadline:
        job = await api.job(str(job["id"]))
        if job["status"] == "complete":
            return await api.download(job["download_url"])
        if job["status"] in ("failed", "expired"):
            raise StreamError(f"a compliance job at X has {job['status']}")
        await asyncio.sleep(options.poll_s)
    raise StreamError("a compliance job at X did not end in time")


class ComplianceKeeper:
    """Keeps what is stored as X wants it, for as long as it runs. It never raises: what fails is done later."""

    def __init__(self, base_url: str, token: str, eraser: Eraser, *, source: str, options: ComplianceOptions) -> None:
        self._base_url = base_url
        self._token = token
        self._eraser = eraser
        self._enforcer = Enforcer(eraser)
        self._source = source
        self._options = options
        self._api: ComplianceApi | None = None

    def use_token(self, token: str) -> None:
        """Ask with `token` from now on; a stream that is open goes on as it is."""
        self._token = token
        if self._api is not None:
            self._api.use_token(token)

    async def run(self) -> None:
        """Sweep, or follow the streams, until cancelled."""
        if self._options.mode == "off":
            await asyncio.Event().wait()
        async with ComplianceApi(self._base_url, self._token) as api:
            self._api = api
            if self._options.mode == "sweep":
                await self._sweep_for_ever(api)
            partitions = range(1, self._options.partitions + 1)
            async with asyncio.TaskGroup() as tasks:
                for of in ("tweets", "users"):
                    budget = ConnectBudget(time.monotonic, limit=_CONNECTS_PER_WINDOW)
                    for partition in partitions:
                        tasks.create_task(self._follow(api, of, partition, budget))

    async def _sweep_for_ever(self, api: ComplianceApi) -> None:
        name = f"{self._source}_compliance"
        while True:
            reached = await until_it_works(lambda: cursor(self._eraser.db, name), _note)
            age_s = (datetime.now(UTC) - reached.moved_at).total_seconds() if reached else self._options.sweep_every_s
            await asyncio.sleep(max(self._options.sweep_every_s - age_s, 0.0))
            try:
                await sweep(api, self._enforcer, self._eraser, self._options)
                await touch_cursor(self._eraser.db, name)
            except (OvertoneError, ValueError, OSError) as error:
                _log.warning("compliance.sweep_failed", reason=str(error))
                await asyncio.sleep(min(_FAILED_SWEEP_WAIT_S, self._options.sweep_every_s))

    async def _follow(self, api: ComplianceApi, of: str, partition: int, budget: ConnectBudget) -> None:
        """Hold one partition of a compliance stream and do what comes, in order."""
        name, backoff = f"{self._source}_compliance_{of}_{partition}", Backoff()
        while True:
            await asyncio.sleep(budget.wait_s())
            budget.spend()
            began = time.monotonic()
            try:
                async with api.events(f"/2/{of}/compliance/stream", await self._where(name, partition)) as response:
                    if response.status != 200:
                        raise StreamError(f"the X API answers {response.status}", status=response.status)
                    await self._take(response.content, name)
                failure = Failure.NETWORK
            except StreamError as error:
                failure = Failure.THROTTLED if error.details.get("status") == 429 else Failure.HTTP
                _log.warning("compliance.stream_refused", stream=name, reason=error.message)
            except (aiohttp.ClientError, TimeoutError, OSError, UnavailableError) as error:
                failure = Failure.NETWORK
                _log.warning("compliance.stream_lost", stream=name, reason=type(error).__name__)
            if time.monotonic() - began >= _STABLE_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_s(failure))

    async def _where(self, name: str, partition: int) -> dict[str, str]:
        """The parameters that make the stream go on where it was left."""
        reached = await until_it_works(lambda: cursor(self._eraser.db, name), _note)
        parameters = {"partition": str(partition)}
        if reached is None:
            return parameters
        away = datetime.now(UTC) - reached.moved_at
        if away > _MAX_BACKFILL - timedelta(minutes=1):
            since = reached.moved_at - timedelta(minutes=1)
            return parameters | {"start_time": since.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return parameters | {"backfill_minutes": str(int(away.total_seconds() // 60) + 1)}

    async def _take(self, content: aiohttp.StreamReader, name: str) -> None:
        """Gather events and do them, until the stream ends; the cursor moves with what was done."""
        await touch_cursor(self._eraser.db, name)
        lines: asyncio.Queue[bytes] = asyncio.Queue(_MAX_EVENTS)
        # A read that is given up may lose half a line: reading is a task of its own.
        reader = asyncio.create_task(_read_into(lines, content))
        touched = time.monotonic()
        try:
            while not (reader.done() and lines.empty()):
                await asyncio.sleep(self._options.flush_s)
                actions = [action for _ in range(lines.qsize()) for action in _readable(lines.get_nowait())]
                if actions or time.monotonic() - touched > _TOUCH_EVERY_S:
                    await until_it_works(lambda actions=actions: self._enforce(actions, name), _note)  # type: ignore[misc]
                    touched = time.monotonic()
            await reader
        finally:
            reader.cancel()

    async def _enforce(self, actions: Sequence[Action], name: str) -> None:
        await self._enforcer.enforce(actions)
        await touch_cursor(self._eraser.db, name)


async def _read_into(lines: asyncio.Queue[bytes], content: aiohttp.StreamReader) -> None:
    while line := await content.readline():
        await lines.put(line)


def _readable(line: bytes) -> list[Action]:
    try:
        return actions_of(line)
    except ValueError:
        _log.warning("compliance.line_dropped", size_bytes=len(line))
        return []


def _note(error: OvertoneError) -> None:
    _log.warning("compliance.delayed", code=error.code, reason=error.message)


def _actions(kind: str, about: Mapping[str, Any]) -> list[Action]:
    if kind in _OF_POST:
        what, reason = _OF_POST[kind]
        post = about.get("tweet") or about
        author = post.get("author_id")
        return [Action(what, int(post["id"]), reason, int(author) if author else None)]
    if kind in _OF_USER:
        what, reason = _OF_USER[kind]
        return [
            Action(what, int(about["user"]["id"]), reason, up_to_post_id=int(about.get("up_to_tweet_id", 2**63 - 1)))
        ]
    if kind == "tweet_edit":
        versions = sorted(map(int, about["tweet"]["edit_tweet_ids"]))
        return [Action("erase_post", version, "edited") for version in versions[:-1]]
    return []
