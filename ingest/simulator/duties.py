"""The simulator's compliance streams and batch compliance jobs, as routes."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import aiohttp
from aiohttp import web

from ingest.simulator.answers import bad_request, refused
from ingest.simulator.compliance import PARTITIONS, Event, Jobs
from ingest.simulator.redaction import Redactions
from ingest.simulator.requests import LIMIT_HEADERS, json_of, number_in
from ingest.timeline import to_line

_TICK_S = 0.02


class ComplianceRoutes:
    """What tells clients which posts and authors are gone."""

    def __init__(self, redactions: Redactions, *, keep_alive_s: float) -> None:
        self._redactions = redactions
        self._keep_alive_s = keep_alive_s
        self._jobs = Jobs(redactions.verdict)

    def add_to(self, app: web.Application) -> None:
        """Add the routes to `app`."""
        app.router.add_get("/2/tweets/compliance/stream", self._stream)
        app.router.add_get("/2/users/compliance/stream", self._stream)
        app.router.add_post("/2/compliance/jobs", self._create)
        app.router.add_get("/2/compliance/jobs", self._list)
        app.router.add_get("/2/compliance/jobs/{id}", self._show)
        app.router.add_put("/simulator/compliance/{id}/upload", self._upload)
        app.router.add_get("/simulator/compliance/{id}/download", self._download)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        try:
            partition = number_in(request, "partition")
            minutes = number_in(request, "backfill_minutes") or 0
        except ValueError:
            partition, minutes = None, 0
        if partition is None or not 1 <= partition <= PARTITIONS:
            return bad_request(f"`partition` is required and must be from 1 to {PARTITIONS}")
        log, is_of_user = self._redactions.events, "/users/" in request.path
        number = log.number_at(datetime.now(UTC) - timedelta(minutes=minutes)) if minutes else log.end
        response = web.StreamResponse(headers={"Content-Type": "application/json"} | request[LIMIT_HEADERS])
        try:
            await response.prepare(request)
            quiet_since = time.monotonic()
            while True:
                number, events = log.since(number)
                lines = _lines_of(events, is_of_user, partition)
                if lines or time.monotonic() - quiet_since > self._keep_alive_s:
                    await response.write(lines or b"\r\n")
                    quiet_since = time.monotonic()
                await asyncio.sleep(_TICK_S)
        except (ConnectionError, aiohttp.ClientError):
            return response

    async def _create(self, request: web.Request) -> web.Response:
        job = self._jobs.create(await json_of(request))
        if job is None:
            return bad_request("`type` must be tweets or users")
        return web.json_response({"data": job.shown(_root(request))})

    async def _list(self, request: web.Request) -> web.Response:
        jobs = [job.shown(_root(request)) for job in self._jobs.of_type(request.query.get("type"))]
        return web.json_response({"data": jobs, "meta": {"result_count": len(jobs)}})

    async def _show(self, request: web.Request) -> web.Response:
        job = self._jobs.find(request.match_info["id"])
        if job is None:
            return refused(404, detail="There is no such job.")
        shown = job.shown(_root(request))
        self._jobs.advance(job)
        return web.json_response({"data": shown})

    async def _upload(self, request: web.Request) -> web.Response:
        job = self._jobs.find(request.match_info["id"])
        if job is None or job.status != "created":
            return refused(403, detail="The address has expired.")
        self._jobs.take(job, (await request.read()).splitlines())
        return web.Response()

    async def _download(self, request: web.Request) -> web.Response:
        job = self._jobs.find(request.match_info["id"])
        if job is None or job.status != "complete":
            return refused(404, detail="The result is not there yet.")
        return web.Response(body=job.answer, content_type="text/plain")


def _lines_of(events: Sequence[Event], is_of_user: bool, partition: int) -> bytes:
    wanted = [event for event in events if event.is_of_user == is_of_user and event.partition == partition]
    return b"".join(to_line(dict(event.line)) for event in wanted)


def _root(request: web.Request) -> str:
    return f"{request.scheme}://{request.host}"
