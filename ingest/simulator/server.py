"""The simulator's state and its routes."""

import asyncio
import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from ingest.posts import PostSource, open_posts
from ingest.rulebook import Rulebook
from ingest.simulator.answers import bad_request, no_rules, refused
from ingest.simulator.duties import ComplianceRoutes
from ingest.simulator.faults import COMPLIANCE, Fault
from ingest.simulator.feed import ON_CONNECTION, ON_POSTS, Feed, Source
from ingest.simulator.ledger import FOUND, LEDGER_WINDOW_S, STREAMED, Ledger
from ingest.simulator.limits import Window
from ingest.simulator.matching import Rule, RuleSyntaxError, Subject, parse
from ingest.simulator.options import LIMITS, SimulatorOptions
from ingest.simulator.redaction import Redactions
from ingest.simulator.requests import LIMIT_HEADERS, base36, instant_of, json_of, number_in, wanted_fields
from ingest.simulator.scenario import Scenario
from ingest.timeline import Timeline, seven_days_before
from overtone.errors import ConfigurationError
from overtone.logging import get_logger

_TICK_S = 0.02
_MAX_BACKFILL_MINUTES = 5
_MAX_REPLAYS = 2
_LEDGER_IDS = 1_000_000
_LIMITED = {
    "/2/tweets/search/stream": "stream",
    "/2/tweets/sample10/stream": "stream",
    "/2/tweets/firehose/stream": "stream",
    "/2/tweets/search/recent": "search",
    "/2/usage/tweets": "usage",
    "/2/connections": "connections",
}
PARTITIONS = {"sample10": 2, "firehose": 20}
"""Streams of all posts, and into how many parts X splits them."""
_ALL_FIELDS = frozenset({"author_id", "lang", "referenced_tweets", "geo"})
_STATES = ("published", "streamed", "found", "gone")

_log = get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Simulator:
    """A server's state; `application()` makes it servable."""

    def __init__(self, options: SimulatorOptions, source: PostSource, scenario: Scenario | None = None) -> None:
        """`scenario` adds its steps; its own options are not looked at."""
        self._options = options
        self.rulebook = Rulebook(parse if options.evaluates_rules else None)
        started_at = time.time() - options.history_s
        self.timeline = Timeline(source, rate=options.rate, started_at=started_at, limit=options.limit)
        self.timeline.publish_until(time.time())
        self.ledger = Ledger(LEDGER_WINDOW_S)
        self.redactions = Redactions(self.timeline, self.ledger, source, random.Random(f"redact:{options.seed}"))
        self._schedule = (scenario or Scenario()).schedule()
        self._windows = {name: Window(options.calls_per_window(name), options.window_s, time.time) for name in LIMITS}
        self._source = Source(
            timeline=self.timeline,
            ledger=self.ledger,
            rng=random.Random(f"feed:{options.seed}"),
            keep_alive_s=options.keep_alive_s,
            message=self._message,
            may_send=lambda: not self._is_capped,
        )
        self._feeds: list[Feed] = []
        self._refusals: deque[Fault] = deque()
        self._first_connected: float | None = None
        self._search_down_until, self._search_status = 0.0, 503
        self._packs = options.gzips

    @property
    def connects(self) -> int:
        """Connections to the stream that were let in."""
        return self.ledger.connects

    @property
    def scenario_is_over(self) -> bool:
        """Whether every step of the scenario has been done."""
        return self._schedule.is_over

    def application(self) -> web.Application:
        """The aiohttp application; it publishes posts for as long as it runs."""
        app = web.Application(middlewares=[self._gate], client_max_size=64 * 2**20)
        app.cleanup_ctx.append(self._publishing)
        app.router.add_get("/2/tweets/search/stream", self._stream)
        app.router.add_get("/2/tweets/sample10/stream", self._stream)
        app.router.add_get("/2/tweets/firehose/stream", self._stream)
        app.router.add_get("/2/tweets/search/stream/rules", self._get_rules)
        app.router.add_get("/2/tweets/search/stream/rules/counts", self._count_rules)
        app.router.add_post("/2/tweets/search/stream/rules", self._post_rules)
        app.router.add_get("/2/tweets/search/recent", self._recent)
        app.router.add_get("/2/usage/tweets", self._usage)
        app.router.add_get("/2/connections", self._list_connections)
        app.router.add_delete("/2/connections", self._delete_listed)
        app.router.add_delete("/2/connections/{which}", self._delete_connections)
        app.router.add_get("/simulator/ledger", self._show_ledger)
        app.router.add_post("/simulator/faults", self._order)
        ComplianceRoutes(self.redactions, keep_alive_s=self._options.keep_alive_s).add_to(app)
        return app

    def ids(self, state: str = "published") -> Iterator[int]:
        """The ids, ascending, of the posts that are kept and were published, streamed or found, or are gone."""
        if state == "published":
            return iter(self.timeline.ids())
        if state == "gone":
            positions = self.redactions.gone()
        else:
            positions = self.ledger.positions(STREAMED if state == "streamed" else FOUND)
        return (self.timeline.post_id(position) for position in positions)

    def inflict(self, fault: Fault) -> bool:
        """Do `fault`; whether there was anything to do it to."""
        kind, size = fault.kind, fault.size
        if kind in ON_CONNECTION:
            for feed in self._feeds:
                feed.commands.append(fault)
                feed.wake.set()
            done = bool(self._feeds)
        else:
            done = True
            if kind in ON_POSTS:
                self._source.on_posts[kind] += int(size)
            elif kind == "refuse":
                self._refusals.extend([fault] * int(size))
            elif kind == "search_down":
                self._search_down_until, self._search_status = time.monotonic() + size, fault.status
            elif kind == "gzip":
                self._packs = bool(size)
            elif kind == "silence":
                self.timeline.silence()
            elif kind in COMPLIANCE:
                done = self.redactions.order(kind, int(size), fault.ids)
        self.ledger.faults[kind] += done
        return done

    async def _publishing(self, _app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._publish_for_ever())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _publish_for_ever(self) -> None:
        while True:
            if self.timeline.publish_due(time.time()):
                self.ledger.forget_before(self.timeline.start)
                for feed in self._feeds:
                    feed.wake.set()
            elapsed = None if self._first_connected is None else time.monotonic() - self._first_connected
            for fault in self._schedule.due(elapsed, self.timeline.end):
                was_done = self.inflict(fault)
                _log.info("simulator.fault", kind=fault.kind, amount=fault.size, done=was_done)
            await asyncio.sleep(_TICK_S)

    @web.middleware
    async def _gate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the token, count the call and tell about its window."""
        if not request.path.startswith("/2/"):
            return await handler(request)
        name = _limit_of(request)
        if name == "stream":
            self.ledger.note_attempt(time.monotonic())
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        window = self._windows[name]
        if scheme != "Bearer" or not token or self._options.token not in (None, token):
            response: web.StreamResponse = refused(401, detail="Unauthorized")
        elif not window.take():
            response = refused(429, "rate_limit")
        else:
            request[LIMIT_HEADERS] = window.headers()
            response = await handler(request)
        if not response.prepared:
            response.headers.update(window.headers())
        return response

    # The stream

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refuse_stream(request)
        if refusal is not None:
            return refusal
        try:
            self._check_partition(request)
            start, end = self._span(request)
        except ValueError as error:
            return bad_request(str(error))
        self.ledger.connects += 1
        self._first_connected = self._first_connected or time.monotonic()
        packs = self._packs and "gzip" in request.headers.get("Accept-Encoding", "")
        response = web.StreamResponse(headers={"Content-Type": "application/json"} | request[LIMIT_HEADERS])
        if packs:
            response.headers["Content-Encoding"] = "gzip"
        feed = Feed(self._source, request, response, start, end, partition=_partition(request))
        self._feeds.append(feed)
        _log.info("simulator.client_connected", connects=self.connects)
        try:
            await response.prepare(request)
            await feed.run(packs=packs)
        except (ConnectionError, aiohttp.ClientError):
            pass
        finally:
            self._forget(feed)
            _log.info("simulator.client_gone", streamed=self.ledger.streamed)
        return response

    def _refuse_stream(self, request: web.Request) -> web.Response | None:
        if self._refusals:
            fault = self._refusals.popleft()
            return refused(fault.status, fault.reason)
        if self._is_capped:
            return refused(429, "usage_cap")
        is_replay = "end_time" in request.query
        rivals = [feed for feed in self._feeds if feed.is_replay == is_replay and feed.partition == _partition(request)]
        if len(rivals) >= (_MAX_REPLAYS if is_replay else self._options.max_connections):
            if is_replay or not self._options.replaces_connection:
                return refused(429, "too_many_connections")
            self._end(rivals[0])
        return None if self.rulebook.rules or _is_volume(request) else no_rules()

    def _check_partition(self, request: web.Request) -> None:
        endpoint, partition = _endpoint(request), _partition(request)
        if _is_volume(request) and not self._options.has_backfill:
            raise ValueError(f"{endpoint} is not part of this plan")
        if _is_volume(request) and not 1 <= partition <= PARTITIONS[endpoint]:
            raise ValueError(f"partition must be from 1 to {PARTITIONS[endpoint]}")

    def _span(self, request: web.Request) -> tuple[int, int | None]:
        """The positions a connection begins and ends with."""
        query, timeline = request.query, self.timeline
        asked = [name for name in ("backfill_minutes", "start_time", "end_time") if name in query]
        if asked and not self._options.has_backfill:
            raise ValueError(f"{asked[0]} is not part of this plan")
        if "start_time" in query:
            end = instant_of(query["end_time"]) if "end_time" in query else None
            start = timeline.position_at(instant_of(query["start_time"]))
            return start, None if end is None else timeline.position_at(end)
        minutes = int(query.get("backfill_minutes", "0"))
        if not 0 <= minutes <= _MAX_BACKFILL_MINUTES:
            raise ValueError(f"backfill_minutes must be from 0 to {_MAX_BACKFILL_MINUTES}")
        if minutes:
            return timeline.position_at(datetime.now(UTC) - timedelta(minutes=minutes)), None
        return timeline.end, None

    @property
    def _is_capped(self) -> bool:
        return self._options.cap_posts is not None and self.ledger.reads >= self._options.cap_posts

    def _message(self, request: web.Request, position: int) -> dict[str, Any] | None:
        """The post at `position` as the stream sends it; None for one that is gone or that no rule matches."""
        if self.redactions.is_gone(position) or not _falls_into(position, request):
            return None
        rules = () if _is_volume(request) else self.rulebook.rules
        if self._options.evaluates_rules and not _is_volume(request):
            subject = self._subject(position)
            matching = [rule for rule in rules if self.rulebook.matches(rule, subject)]
            if not matching:
                return None
        else:
            matching = [rules[position % len(rules)]] if rules else []
        fields, with_users = wanted_fields(request)
        message: dict[str, Any] = {"data": self.timeline.post(position, fields)}
        if with_users:
            message["includes"] = {"users": [self.timeline.user(position)]}
        if not _is_volume(request):
            message["matching_rules"] = [rule.matched() for rule in matching]
        return message

    def _subject(self, position: int) -> Subject:
        post = self.timeline.post(position, _ALL_FIELDS | {"note_tweet"})
        whole = post.get("note_tweet", {}).get("text", post["text"])
        username = self.timeline.user(position)["username"]
        return Subject({**post, "text": whole, "username": username}, position)

    # Calls with one answer

    async def _get_rules(self, _request: web.Request) -> web.Response:
        return web.json_response(self.rulebook.listing())

    async def _count_rules(self, _request: web.Request) -> web.Response:
        counts = {"client_app_rules_count": len(self.rulebook.rules), "cap_per_client_app": "1000"}
        return web.json_response({"data": counts})

    async def _post_rules(self, request: web.Request) -> web.Response:
        query = request.query
        status, answer = self.rulebook.change(
            await json_of(request),
            dry_run=query.get("dry_run", "").lower() == "true",
            delete_all=query.get("delete_all", "").lower() == "true",
        )
        return web.json_response(answer, status=status)

    async def _recent(self, request: web.Request) -> web.Response:
        if time.monotonic() < self._search_down_until or self._is_capped:
            return refused(429, "usage_cap") if self._is_capped else refused(self._search_status)
        try:
            since_id, until_id = number_in(request, "since_id"), number_in(request, "until_id")
            max_results = number_in(request, "max_results") or 10
            if "next_token" in request.query:
                until_id = int(request.query["next_token"], 36)
            accepts = self._search_filter(request.query.get("query", ""))
        except RuleSyntaxError as error:
            return bad_request(f"There were errors processing your request: {error}")
        except ValueError:
            return bad_request("since_id, until_id, max_results and next_token must be as documented")
        oldest = seven_days_before(time.time())
        if not request.query.get("query") or not 10 <= max_results <= 100:
            return bad_request("`query` is required and `max_results` must be from 10 to 100")
        if since_id is not None and since_id < oldest:
            return bad_request(f"'since_id' must be a tweet id created after {oldest}")
        page = self.timeline.search(since_id=since_id, until_id=until_id, max_results=max_results, accepts=accepts)
        for position in page.positions:
            self.ledger.mark(position, FOUND)
        self.ledger.found += len(page.positions)
        return web.json_response(self._shown(request, page.positions, page.next_until_id))

    def _search_filter(self, query: str) -> Callable[[int], bool]:
        rule: Rule | None = parse(query, in_search=True) if self._options.evaluates_rules and query else None

        def accepts(position: int) -> bool:
            return not self.redactions.is_gone(position) and (rule is None or rule(self._subject(position)))

        return accepts

    def _shown(self, request: web.Request, positions: tuple[int, ...], next_until_id: int | None) -> dict[str, Any]:
        fields, with_users = wanted_fields(request)
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
            meta["next_token"] = base36(next_until_id)
        return answer

    async def _usage(self, _request: web.Request) -> web.Response:
        used = str(self.ledger.reads)
        day = datetime.now(UTC).strftime("%Y-%m-%dT00:00:00.000Z")
        data = {
            "cap_reset_day": 1,
            "project_cap": str(self._options.cap_posts or 3_000_000),
            "project_id": "1",
            "project_usage": used,
            "daily_project_usage": {"project_id": "1", "usage": [{"date": day, "usage": used}]},
        }
        return web.json_response({"data": data})

    async def _list_connections(self, _request: web.Request) -> web.Response:
        shown = [
            {
                "id": feed.feed_id,
                "endpoint_name": "filtered_stream",
                "connected_at": feed.connected_at.isoformat(),
            }
            for feed in self._feeds
        ]
        meta = {"meta": {"result_count": len(shown)}}
        return web.json_response({"data": shown, **meta} if shown else meta)

    async def _delete_connections(self, request: web.Request) -> web.Response:
        which = request.match_info["which"]
        return self._killed([f for f in self._feeds if which in {"all", "filtered_stream", f.feed_id}])

    async def _delete_listed(self, request: web.Request) -> web.Response:
        body = await json_of(request)
        wanted = set(map(str, body.get("uuids", ()))) if isinstance(body, dict) else set()
        return self._killed([feed for feed in self._feeds if feed.feed_id in wanted])

    def _killed(self, feeds: list[Feed]) -> web.Response:
        for feed in feeds:
            self._end(feed)
        return web.json_response({"data": {"successful_kills": len(feeds), "failed_kills": 0}})

    def _end(self, feed: Feed) -> None:
        feed.commands.append(Fault(kind="close"))
        feed.wake.set()
        self._forget(feed)

    def _forget(self, feed: Feed) -> None:
        if feed in self._feeds:
            self._feeds.remove(feed)

    # What the X API does not have

    async def _show_ledger(self, request: web.Request) -> web.Response:
        state = request.query.get("state", "published")
        try:
            since_id = number_in(request, "since_id") or 0
            limit = min(number_in(request, "limit") or _LEDGER_IDS, _LEDGER_IDS)
        except ValueError:
            return bad_request("since_id and limit must be numbers")
        if state not in _STATES:
            return bad_request(f"state must be one of {', '.join(_STATES)}")
        ledger, timeline = self.ledger, self.timeline
        ids = (post_id for post_id in self.ids(state) if post_id > since_id)
        return web.json_response(
            {
                "published": timeline.end,
                "delivered": ledger.streamed,
                "found": ledger.found,
                "connects": ledger.connects,
                "attempts": ledger.attempts,
                "most_attempts_in_window": ledger.most_attempts,
                "faults": Counter({kind: count for kind, count in ledger.faults.items() if count}),
                "scenario_is_over": self.scenario_is_over,
                "ids": [str(post_id) for post_id in islice(ids, limit)],
            }
        )

    async def _order(self, request: web.Request) -> web.Response:
        try:
            fault = Fault.model_validate(await json_of(request))
        except ValidationError as error:
            return bad_request(error.errors()[0]["msg"].removeprefix("Value error, "))
        return web.json_response({"applied": self.inflict(fault)})


def _endpoint(request: web.Request) -> str:
    return request.path.split("/")[3]


def _is_volume(request: web.Request) -> bool:
    """Whether the stream is one of all posts, which are not matched by rules."""
    return _endpoint(request) in PARTITIONS


def _partition(request: web.Request) -> int:
    """The partition asked for, 0 for none or one that is no number."""
    asked = request.query.get("partition", "0")
    return int(asked) if asked.isdecimal() and len(asked) < 4 else 0


def _falls_into(position: int, request: web.Request) -> bool:
    """Whether the post at `position` belongs into the stream that `request` asks for."""
    if not _is_volume(request):
        return True
    endpoint = _endpoint(request)
    taken, rest = (True, position) if endpoint == "firehose" else (position % 10 == 0, position // 10)
    return taken and rest % PARTITIONS[endpoint] + 1 == _partition(request)


def _limit_of(request: web.Request) -> str:
    """The name in `LIMITS` of what limits `request`."""
    path = request.path
    if path.startswith("/2/tweets/search/stream/rules"):
        return "rules_change" if request.method == "POST" else "rules_read"
    if path.endswith("/compliance/stream"):
        return "compliance_stream"
    for start, name in _LIMITED.items():
        if path.startswith(start):
            return name
    return "compliance"


async def start_simulator(
    options: SimulatorOptions, host: str, port: int, *, scenario: Scenario | None = None
) -> web.AppRunner:
    """Serve on host:port and return the runner, whose `cleanup()` stops it; `addresses` holds the port taken.

    Raises:
        ConfigurationError: the posts file cannot be used, or the port is taken.
    """
    simulator = Simulator(options, open_posts(options.posts, options.seed), scenario)
    runner = web.AppRunner(simulator.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigurationError(f"the simulator cannot listen on {host}:{port}: {error.strerror}") from error
    _log.info("simulator.started", host=host, port=runner.addresses[0][1], rate=options.rate)
    return runner
