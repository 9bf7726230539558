"""A local server that speaks the X API v2, so that nothing else is needed to try, show or test the pipeline.

Run it with `python -m ingest.simulator`. It publishes posts on the clock, whether or not anyone listens; whoever was
not connected has to find what it missed by recent search, as with the real one. Rules are kept and listed but not
evaluated: every post counts as matched by one of the active rules. State lives in memory.

Besides the X API there are `GET /simulator/ledger` (every id published) and `POST /simulator/faults` (break
something on purpose).
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from ingest.posts import PostSource, open_posts
from ingest.rulebook import Rulebook
from ingest.timeline import Timeline, seven_days_before, to_line
from overtone.errors import ConfigurationError
from overtone.logging import configure, get_logger

_PROBLEMS = "https://api.x.com/2/problems/"
_TICK_S = 0.02
_WINDOW_S = 900
_MAX_BEHIND_POSTS = 50_000
_MAX_CHUNK_POSTS = 200
_FAULTS = frozenset(
    {"disconnect", "close", "reset", "garbage", "duplicate", "stall", "refuse", "search_down", "silence"}
)

_log = get_logger()


@dataclass(frozen=True, slots=True)
class SimulatorOptions:
    """How the simulator behaves; times in seconds."""

    rate: float = 50.0
    limit: int | None = None
    seed: int = 0
    posts: Path | None = None
    token: str | None = None
    """The only bearer token that is taken; any when None."""
    keep_alive_s: float = 10.0
    connects_per_window: int = 50
    """Connections allowed in 15 minutes, as the X API counts them."""


@dataclass(slots=True)
class _Connection:
    endpoint_id: str
    connected_at: datetime
    position: int
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    commands: deque[tuple[str, float]] = field(default_factory=deque)
    is_over: bool = False


class Simulator:
    """The server's state and its routes; `application()` makes it servable."""

    def __init__(self, options: SimulatorOptions, source: PostSource) -> None:
        self._options = options
        self.rulebook = Rulebook()
        self.timeline = Timeline(source, rate=options.rate, started_at=time.time(), limit=options.limit)
        self.connects = 0
        self._connection: _Connection | None = None
        self._connect_times: deque[float] = deque()
        self._refusals: deque[int] = deque()
        self._delivered = 0
        self._search_down_until = 0.0

    def application(self) -> web.Application:
        """The aiohttp application; it publishes posts for as long as it runs."""
        app = web.Application(middlewares=[self._authorise])
        app.cleanup_ctx.append(self._publishing)
        app.router.add_get("/2/tweets/search/stream", self._stream)
        app.router.add_get("/2/tweets/search/stream/rules", self._get_rules)
        app.router.add_post("/2/tweets/search/stream/rules", self._post_rules)
        app.router.add_get("/2/tweets/search/recent", self._recent)
        app.router.add_get("/2/usage/tweets", self._usage)
        app.router.add_get("/2/connections", self._list_connections)
        app.router.add_delete("/2/connections/{which}", self._delete_connections)
        app.router.add_get("/simulator/ledger", self._ledger)
        app.router.add_post("/simulator/faults", self._fault)
        return app

    async def _publishing(self, _app: web.Application) -> Any:
        task = asyncio.create_task(self._publish_for_ever())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _publish_for_ever(self) -> None:
        while True:
            if self.timeline.publish_due(time.time()) and self._connection is not None:
                self._connection.wake.set()
            await asyncio.sleep(_TICK_S)

    @web.middleware
    async def _authorise(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        is_known = scheme == "Bearer" and token and self._options.token in (None, token)
        if request.path.startswith("/2/") and not is_known:
            return _problem(401, "Unauthorized", "about:blank", "Unauthorized")
        return await handler(request)

    # The stream

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        refused = self._refuse_stream()
        if refused is not None:
            return refused
        self.connects += 1
        connection = _Connection(str(uuid.uuid4()), datetime.now(UTC), self.timeline.end)
        self._connection = connection
        response = web.StreamResponse(headers={"Content-Type": "application/json", **self._rate_headers()})
        _log.info("simulator.client_connected", connects=self.connects)
        try:
            await response.prepare(request)
            await self._feed(request, response, connection)
        except (ConnectionError, aiohttp.ClientError):
            pass
        finally:
            if self._connection is connection:
                self._connection = None
            _log.info("simulator.client_gone", delivered=self._delivered)
        return response

    def _refuse_stream(self) -> web.Response | None:
        now = time.monotonic()
        while self._connect_times and now - self._connect_times[0] > _WINDOW_S:
            self._connect_times.popleft()
        if len(self._connect_times) >= self._options.connects_per_window:
            body = {"errors": [{"code": 88, "message": "Rate limit exceeded"}]}
            return web.json_response(body, status=429, headers=self._rate_headers())
        self._connect_times.append(now)
        if self._refusals:
            status = self._refusals.popleft()
            return _problem(status, "Refused", "about:blank", "Refused on purpose.", self._rate_headers())
        if self._connection is not None:
            return web.json_response(
                {
                    "title": "ConnectionException",
                    "detail": "This stream is currently at the maximum allowed connection limit.",
                    "connection_issue": "TooManyConnections",
                    "type": _PROBLEMS + "streaming-connection",
                },
                status=429,
                headers=self._rate_headers(),
            )
        if not self.rulebook.rules:
            detail = "There are no rules; add one before you connect."
            return _problem(409, "ConnectionException", _PROBLEMS + "rules", detail, self._rate_headers())
        return None

    def _rate_headers(self) -> dict[str, str]:
        limit = self._options.connects_per_window
        oldest = self._connect_times[0] if self._connect_times else time.monotonic()
        reset = time.time() + _WINDOW_S - (time.monotonic() - oldest)
        return {
            "x-rate-limit-limit": str(limit),
            "x-rate-limit-remaining": str(max(limit - len(self._connect_times), 0)),
            "x-rate-limit-reset": str(int(reset) + 1),
        }

    async def _feed(self, request: web.Request, response: web.StreamResponse, connection: _Connection) -> None:
        while not connection.is_over:
            connection.wake.clear()
            if connection.commands:
                await self._obey(request, response, connection)
            elif connection.position < self.timeline.end:
                await self._send_posts(request, response, connection)
            else:
                try:
                    await asyncio.wait_for(connection.wake.wait(), self._options.keep_alive_s)
                except TimeoutError:
                    await response.write(b"\r\n")

    async def _send_posts(self, request: web.Request, response: web.StreamResponse, connection: _Connection) -> None:
        if self.timeline.end - connection.position > _MAX_BEHIND_POSTS:
            connection.commands.append(("disconnect", 1))
            return
        end = min(self.timeline.end, connection.position + _MAX_CHUNK_POSTS)
        await response.write(self._lines(request, range(connection.position, end)))
        self._delivered += end - connection.position
        connection.position = end

    async def _obey(self, request: web.Request, response: web.StreamResponse, connection: _Connection) -> None:
        kind, amount = connection.commands.popleft()
        if kind == "garbage":
            await response.write(b'{"data": {"id": oops\r\n' * int(amount))
        elif kind == "duplicate":
            first = max(connection.position - int(amount), self.timeline.start)
            await response.write(self._lines(request, range(first, connection.position)))
        elif kind == "stall":
            await asyncio.sleep(amount)
        else:
            connection.is_over = True
        if kind == "disconnect":
            await response.write(to_line(_OPERATIONAL_DISCONNECT))
        elif kind == "reset" and request.transport is not None:
            request.transport.abort()

    def _lines(self, request: web.Request, positions: range) -> bytes:
        fields, with_users = _wanted(request)
        rules = self.rulebook.rules
        lines = []
        for position in positions:
            message: dict[str, Any] = {"data": self.timeline.post(position, fields)}
            if with_users:
                message["includes"] = {"users": [self.timeline.user(position)]}
            message["matching_rules"] = [rules[position % len(rules)].matched()] if rules else []
            lines.append(to_line(message))
        return b"".join(lines)

    # Calls with one answer

    async def _get_rules(self, _request: web.Request) -> web.Response:
        return web.json_response(self.rulebook.listing())

    async def _post_rules(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError:
            body = None
        status, answer = self.rulebook.change(body, dry_run=request.query.get("dry_run", "").lower() == "true")
        return web.json_response(answer, status=status)

    async def _recent(self, request: web.Request) -> web.Response:
        if time.monotonic() < self._search_down_until:
            return _problem(503, "Service Unavailable", "about:blank", "Refused on purpose.")
        try:
            since_id = _number(request, "since_id")
            until_id = _number(request, "until_id")
            max_results = _number(request, "max_results") or 10
            if "next_token" in request.query:
                until_id = int(request.query["next_token"], 36)
        except ValueError:
            return _bad_request("since_id, until_id, max_results and next_token must be as documented")
        oldest = seven_days_before(time.time())
        if not request.query.get("query") or not 10 <= max_results <= 100:
            return _bad_request("`query` is required and `max_results` must be from 10 to 100")
        if since_id is not None and since_id < oldest:
            return _bad_request(f"'since_id' must be a tweet id created after {oldest}")
        page = self.timeline.search(since_id=since_id, until_id=until_id, max_results=max_results)
        return web.json_response(self._shown(request, page.positions, page.next_until_id))

    def _shown(self, request: web.Request, positions: tuple[int, ...], next_until_id: int | None) -> dict[str, Any]:
        fields, with_users = _wanted(request)
        meta: dict[str, Any] = {"result_count": len(positions)}
        answer: dict[str, Any] = {"meta": meta}
        if positions:
            answer["data"] = [self.timeline.post(position, fields) for position in positions]
            meta["newest_id"] = str(self.timeline.post_id(positions[0]))
            meta["oldest_id"] = str(self.timeline.post_id(positions[-1]))
            if with_users:
                users = {user["id"]: user for user in map(self.timeline.user, positions)}
                answer["includes"] = {"users": list(users.values())}
        if next_until_id is not None:
            meta["next_token"] = _base36(next_until_id)
        return answer

    async def _usage(self, _request: web.Request) -> web.Response:
        used = str(self._delivered)
        day = datetime.now(UTC).strftime("%Y-%m-%dT00:00:00.000Z")
        data = {
            "cap_reset_day": 1,
            "project_cap": "3000000",
            "project_id": "1",
            "project_usage": used,
            "daily_project_usage": {"project_id": "1", "usage": [{"date": day, "usage": used}]},
        }
        return web.json_response({"data": data})

    async def _list_connections(self, _request: web.Request) -> web.Response:
        connection = self._connection
        if connection is None:
            return web.json_response({"meta": {"result_count": 0}})
        shown = {
            "id": connection.endpoint_id,
            "endpoint_name": "filtered_stream",
            "connected_at": connection.connected_at.isoformat(),
        }
        return web.json_response({"data": [shown], "meta": {"result_count": 1}})

    async def _delete_connections(self, request: web.Request) -> web.Response:
        which, connection = request.match_info["which"], self._connection
        killed = connection is not None and which in {"all", "filtered_stream", connection.endpoint_id}
        if killed and connection is not None:
            self._command("close", 1)
            self._connection = None
        counts = {"successful_kills": int(killed), "failed_kills": 0}
        return web.json_response({"data": counts})

    # What the X API does not have

    async def _ledger(self, request: web.Request) -> web.Response:
        try:
            since_id = _number(request, "since_id") or 0
        except ValueError:
            return _bad_request("since_id must be a number")
        ids = [str(post_id) for post_id in self.timeline.ids(since_id)]
        return web.json_response(
            {"published": self.timeline.end, "delivered": self._delivered, "connects": self.connects, "ids": ids}
        )

    async def _fault(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            kind, amount = str(body["kind"]), float(body.get("amount", 1))
            status = int(body.get("status", 503))
        except (ValueError, KeyError, TypeError, AttributeError):
            return _bad_request("the body is {kind, amount, status}")
        if kind not in _FAULTS:
            return _bad_request(f"kind must be one of {', '.join(sorted(_FAULTS))}")
        if kind == "refuse":
            self._refusals.extend([status] * int(amount))
        elif kind == "search_down":
            self._search_down_until = time.monotonic() + amount
        elif kind == "silence":
            self.timeline.silence()
        is_done = kind in {"refuse", "search_down", "silence"}
        return web.json_response({"applied": is_done or self._command(kind, amount)})

    def _command(self, kind: str, amount: float) -> bool:
        if self._connection is None:
            return False
        self._connection.commands.append((kind, amount))
        self._connection.wake.set()
        return True


_OPERATIONAL_DISCONNECT = {
    "errors": [
        {
            "title": "operational-disconnect",
            "disconnect_type": "OperationalDisconnect",
            "detail": "This stream has been disconnected for operational reasons.",
            "type": _PROBLEMS + "operational-disconnect",
        }
    ]
}


def _wanted(request: web.Request) -> tuple[frozenset[str], bool]:
    fields = frozenset(request.query.get("tweet.fields", "").split(","))
    return fields, "author_id" in request.query.get("expansions", "").split(",")


def _number(request: web.Request, name: str) -> int | None:
    value = request.query.get(name)
    return None if value is None else int(value)


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[rest] + digits
    return digits or "0"


def _problem(status: int, title: str, kind: str, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"title": title, "type": kind, "status": status, "detail": detail}
    return web.json_response(body, status=status, headers=headers)


def _bad_request(detail: str) -> web.Response:
    return web.json_response(
        {
            "errors": [{"message": detail}],
            "title": "Invalid Request",
            "detail": "One or more parameters to your request was invalid.",
            "type": _PROBLEMS + "invalid-request",
        },
        status=400,
    )


async def start_simulator(options: SimulatorOptions, host: str, port: int) -> web.AppRunner:
    """Serve on host:port and return the runner, whose `cleanup()` stops it; `addresses` holds the port taken.

    Raises:
        ConfigurationError: the posts file cannot be used, or the port is taken.
    """
    simulator = Simulator(options, open_posts(options.posts, options.seed))
    runner = web.AppRunner(simulator.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigurationError(f"the simulator cannot listen on {host}:{port}: {error.strerror}") from error
    _log.info("simulator.started", host=host, port=runner.addresses[0][1], rate=options.rate)
    return runner


async def _serve(options: SimulatorOptions, host: str, port: int) -> None:
    runner = await start_simulator(options, host, port)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()
    _log.info("simulator.stopped")


def _rate(value: str) -> float:
    rate = float(value)
    if not 0 < rate <= 10_000:
        raise argparse.ArgumentTypeError("must be above 0 and at most 10000")
    return rate


def main(arguments: list[str] | None = None) -> int:
    """Run the simulator until SIGINT or SIGTERM; 2 when it cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m ingest.simulator",
        description="A local server that speaks the X API v2: rules, filtered stream, recent search and usage. "
        "Point X_API_BASE_URL at it; any bearer token will do.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--port", type=int, default=8300, help="TCP port; 0 takes a free one (default: 8300)")
    parser.add_argument("--rate", type=_rate, default=50.0, help="posts a second, above 0 to 10000 (default: 50)")
    parser.add_argument("--posts", type=Path, help="texts to send, .jsonl, .tsv or .csv, over and over")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated posts (default: 0)")
    parser.add_argument("--limit", type=int, help="publish this many posts, then only keep-alives")
    parser.add_argument("--token", help="the only bearer token to accept (default: any)")
    parser.add_argument("--log-format", choices=("json", "console"), default="console")
    given = parser.parse_args(arguments)
    configure("simulator", format=given.log_format)
    options = SimulatorOptions(
        rate=given.rate, limit=given.limit, seed=given.seed, posts=given.posts, token=given.token
    )
    try:
        asyncio.run(_serve(options, given.host, given.port))
    except ConfigurationError as error:
        _log.error("simulator.not_started", reason=error.message)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
