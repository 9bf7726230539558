"""The routes of jobs: upload many texts, see how far they are, fetch the predictions."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from overtone.db import jobs
from overtone.db.database import Database
from overtone.db.jobs import Job, NewJob
from overtone.erasure import require_id
from overtone.errors import (
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    QuotaExceededError,
    TooSlowError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from overtone.job_files import JobFolder
from overtone.logging import get_logger
from overtone.schema import MAX_REPORT_DAYS, MAX_SINCE_DAYS, REPORT_DAYS
from serve import options
from serve.auth import Identity
from serve.bodies import FieldError, invalid, read_json
from serve.chores import ERASURE, REPORT, RETENTION
from serve.encodings import PIECE_BYTES, Inflater, is_gzip
from serve.ndjson import SILENT_S
from serve.options import Options
from serve.rescoring import RESCORING
from serve.scoring import SCORING
from serve.service import JobDesk, Service, json_response
from serve.uploads import Format, Upload, UploadOptions, take_in

IDEMPOTENCY_HEADER = "Idempotency-Key"
MAX_LISTED = 1000
_MAX_CHORE_BYTES = 4096

_FORMATS: tuple[tuple[re.Pattern[str], Format], ...] = (
    (re.compile(r"application/(?:x-ndjson|ndjson|jsonl|x-jsonlines)\s*(?:;|$)", re.IGNORECASE), "ndjson"),
    (re.compile(r"text/csv\s*(?:;|$)", re.IGNORECASE), "csv"),
    (re.compile(r"text/tab-separated-values\s*(?:;|$)", re.IGNORECASE), "tsv"),
)
_COLUMN = re.compile(r"[\w .-]{1,100}")
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_INVALID = ("keep", "reject")


class JobRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def submit_job(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "predict")
        reading, asked = self._asked(request)
        desk, owner = self._desk, _owner(identity)
        db = await desk.open_database()
        if await jobs.open_jobs(db, owner) >= desk.max_open:
            raise QuotaExceededError(f"{desk.max_open} jobs of this key are under way.", retry_after_s=60.0)
        key = _idempotency_key(request)
        if key and (known := await jobs.find_by_request(db, owner, key)):
            return self._accepted(known)
        folder = JobFolder(desk.root, uuid4())
        if desk.uploads.locked():
            raise OverloadedError("Other uploads are under way.", retry_after_s=5.0)
        try:
            async with desk.uploads:
                upload = await _received(request, folder, reading)
            await self._service.gate.spend(identity, upload.lines)
            new = NewJob(folder.job_id, SCORING, owner, asked, upload.chunks, upload.problems, key)
            job, is_new = await jobs.create_job(db, new)
        except ClientDisconnect:
            await asyncio.to_thread(folder.drop)
            return Response(status_code=400)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(folder.drop))
            raise
        if not is_new:
            await asyncio.to_thread(folder.drop)
        get_logger().info("job.submitted", job_id=str(job.job_id), lines=upload.lines, wrong=upload.wrong)
        return self._accepted(job)

    async def submit_retention(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "admin")
        return await self._background(request, identity, RETENTION, {})

    async def submit_erasure(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "admin")
        body = await read_json(request, max_bytes=_MAX_CHORE_BYTES)
        if not isinstance(body, dict) or set(body) != {"kind", "id"} or body["kind"] not in {"post", "author"}:
            raise invalid([FieldError("body", "must hold kind, which is post or author, and id, and nothing else")])
        written = body["id"]
        if not (isinstance(written, str) and written.isascii() and written.isdigit() and len(written) <= 19):
            raise invalid([FieldError("id", "must be a number of at most 19 digits, as a string")])
        require_id(body["kind"], int(written))
        return await self._background(request, identity, ERASURE, {**body, "actor": identity.key_id})

    async def submit_rescoring(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "admin")
        days = await _days(request, "since_days", MAX_SINCE_DAYS)
        since = (datetime.now(UTC) - timedelta(days=days)).isoformat() if days else None
        version = self._service.classifier.bundle.version
        return await self._background(request, identity, RESCORING, {"model_version": version, "since": since})

    async def submit_report(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "admin")
        days = await _days(request, "days", MAX_REPORT_DAYS)
        return await self._background(request, identity, REPORT, {"days": days or REPORT_DAYS})

    async def _background(
        self, request: Request, identity: Identity, kind: str, parameters: dict[str, Any]
    ) -> Response:
        """Store a job that has no upload: a chore, or one that its first chunk plans."""
        await self._service.gate.spend(identity, 0)
        db = await self._desk.open_database()
        is_chore = kind != RESCORING
        new = NewJob(
            uuid4(),
            kind,
            _owner(identity),
            parameters,
            chunks=[int(is_chore)],
            is_planned=is_chore,
            request_key=_idempotency_key(request),
        )
        job, _ = await jobs.create_job(db, new)
        get_logger().info("job.submitted", job_id=str(job.job_id), kind=kind)
        return self._accepted(job)

    async def list_jobs(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "predict")
        limit = _limit(request)
        owner = None if "admin" in identity.scopes else _owner(identity)
        found = await jobs.list_jobs(await self._desk.open_database(), key_id=owner, limit=limit)
        return json_response({"jobs": [self._shown(job) for job in found]}, cached=False)

    async def show_job(self, request: Request) -> Response:
        _, job = await self._own(request)
        return json_response(self._shown(job), cached=False)

    async def job_result(self, request: Request) -> Response:
        _, job = await self._own(request)
        if job.is_under_way:
            raise NotReadyError(
                f"The job is {job.state}: {job.done} of {job.total or 'so far unknown'} lines are done."
            )
        pieces = JobFolder(self._desk.root, job.job_id).results()
        headers = {"cache-control": "no-store"}
        return StreamingResponse(pieces, media_type="application/x-ndjson", headers=headers)

    async def cancel_job(self, request: Request) -> Response:
        db, job = await self._own(request)
        if await jobs.end_job(db, job.job_id, "cancelled"):
            await asyncio.to_thread(JobFolder(self._desk.root, job.job_id).drop_inputs)
            get_logger().info("job.cancelled", job_id=str(job.job_id))
        now = await jobs.find_job(db, job.job_id)
        return json_response(self._shown(now or job), cached=False)

    async def resume_job(self, request: Request) -> Response:
        db, job = await self._own(request)
        if await jobs.resume_job(db, job.job_id):
            get_logger().info("job.resumed", job_id=str(job.job_id))
        elif not job.is_under_way:
            raise invalid([FieldError("job_id", f"names a job that is {job.state}; only one that failed is resumed")])
        now = await jobs.find_job(db, job.job_id)
        return json_response(self._shown(now or job), cached=False)

    async def delete_job(self, request: Request) -> Response:
        db, job = await self._own(request)
        await jobs.delete_job(db, job.job_id)
        await asyncio.to_thread(JobFolder(self._desk.root, job.job_id).drop)
        get_logger().info("job.deleted", job_id=str(job.job_id))
        return Response(status_code=204, headers={"cache-control": "no-store"})

    @property
    def _desk(self) -> JobDesk:
        if self._service.jobs is None:
            raise UnavailableError("Jobs are not configured here.")
        return self._service.jobs

    def _asked(self, request: Request) -> tuple[UploadOptions, dict[str, Any]]:
        """How to read the body, and the options of the predictions.

        Raises:
            InvalidInputError: naming the parameter that is wrong.
            UnsupportedMediaTypeError: the body is of no kind that is taken.
        """
        own = {"column": "text", "invalid": "keep"}
        rest: list[tuple[str, str]] = []
        for name, value in request.query_params.multi_items():
            if name in own:
                own[name] = value
            else:
                rest.append((name, value))
        if not _COLUMN.fullmatch(own["column"]):
            raise invalid(
                [FieldError("column", "must be 1 to 100 letters, digits, spaces, dots, dashes or lines", 100)]
            )
        if own["invalid"] not in _INVALID:
            raise invalid([FieldError("invalid", f"must be one of {', '.join(_INVALID)}")])
        asked = options.from_query(rest)
        asked.check_labels(len(self._service.classifier.bundle.labels))
        if asked.explain:
            raise invalid([FieldError("explain", "is not for jobs")])
        reading = UploadOptions(
            _format(request), own["column"], own["invalid"] == "reject", self._desk.max_bytes, self._desk.max_texts
        )
        return reading, _chosen(asked)

    async def _own(self, request: Request) -> tuple[Database, Job]:
        """The job in the address, which must be the caller's unless that is an administrator.

        Raises:
            NotFoundError: there is none, or it is another's.
        """
        identity = await self._service.gate.authorise(request, "predict")
        try:
            job_id = UUID(request.path_params["job_id"])
        except ValueError:
            raise InvalidInputError("The id of a job is a UUID.") from None
        db = await self._desk.open_database()
        job = await jobs.find_job(db, job_id)
        if job is None or (job.key_id != _owner(identity) and "admin" not in identity.scopes):
            raise NotFoundError("There is no such job.")
        return db, job

    def _accepted(self, job: Job) -> Response:
        response = json_response(self._shown(job), cached=False)
        response.status_code = 202
        response.headers["location"] = f"/jobs/{job.job_id}"
        return response

    def _shown(self, job: Job) -> dict[str, Any]:
        days = self._desk.keep_days
        return {
            "job_id": str(job.job_id),
            "kind": job.kind,
            "state": job.state,
            "done": job.done,
            "failed": job.failed,
            "total": job.total,
            "progress": round(job.done / job.total, 4) if job.total else float(job.total == 0),
            "problems": job.problems,
            "outcome": job.outcome,
            "error": job.error,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "expires_at": job.finished_at + timedelta(days=days) if job.finished_at and days else None,
        }


async def _received(request: Request, folder: JobFolder, reading: UploadOptions) -> Upload:
    """Take the body of `request` apart into `folder`, in a thread that is given it piece by piece.

    Raises:
        ClientDisconnect: the caller left.
        TooSlowError: nothing of the body came for long.
        InvalidInputError: see `take_in`.
        UnavailableError: the files cannot be written.
    """
    loop = asyncio.get_running_loop()
    pieces = _pieces(request)
    has_left = False

    def blocking() -> Iterator[bytes]:
        while not has_left:
            piece = asyncio.run_coroutine_threadsafe(_next(pieces), loop).result()
            if piece is None:
                return
            yield piece

    def work() -> Upload:
        folder.make()
        return take_in(blocking(), folder, reading)

    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        get_logger().error("upload.not_kept", reason=error.strerror)
        raise UnavailableError("The upload cannot be kept now.") from error
    finally:
        has_left = True


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    return await anext(pieces, None)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    packed = request.headers.get("content-encoding", "").encode("latin-1")
    inflater = Inflater() if is_gzip(packed) else None
    more = True
    while more:
        try:
            async with asyncio.timeout(SILENT_S):
                message = await request.receive()
        except TimeoutError:
            raise TooSlowError(f"Nothing of the body arrived for {SILENT_S:.0f} s.") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        if inflater is not None:
            for piece in inflater.feed(body):
                yield piece
        else:
            for start in range(0, len(body), PIECE_BYTES):
                yield body[start : start + PIECE_BYTES]
    if inflater is not None:
        inflater.finish()


def _owner(identity: Identity) -> str:
    # A person keeps an account through keys and sessions that come and go.
    return identity.account or identity.key_id


def _format(request: Request) -> Format:
    media = request.headers.get("content-type", "")
    for pattern, name in _FORMATS:
        if pattern.match(media):
            return name
    known = "application/x-ndjson, text/csv or text/tab-separated-values"
    raise UnsupportedMediaTypeError(f"The header Content-Type must be {known}.")


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get(IDEMPOTENCY_HEADER)
    if key is not None and not _KEY.fullmatch(key):
        raise invalid([FieldError(IDEMPOTENCY_HEADER, "must be 1 to 200 visible ASCII characters", 200, len(key))])
    return key


def _limit(request: Request) -> int:
    given = request.query_params.get("limit", "50")
    if not (given.isascii() and given.isdigit() and len(given) <= 4 and 1 <= int(given) <= MAX_LISTED):
        raise invalid([FieldError("limit", f"must be an integer from 1 to {MAX_LISTED}", MAX_LISTED)])
    return int(given)


async def _days(request: Request, name: str, most: int) -> int | None:
    """The whole number `name` of the body, of which there need be none.

    Raises:
        InvalidInputError: it is not from 1 to `most`, or the body holds something else.
    """
    body = await read_json(request, max_bytes=_MAX_CHORE_BYTES, default=b"{}")
    if not isinstance(body, dict) or body.keys() - {name}:
        raise invalid([FieldError("body", f"must hold {name} or nothing")])
    days = body.get(name)
    if days is not None and not (type(days) is int and 1 <= days <= most):
        raise invalid([FieldError(name, f"must be a whole number from 1 to {most}", most)])
    return days


def _chosen(asked: Options) -> dict[str, Any]:
    """The options that are not the default ones, as a job keeps them."""
    defaults = options.PLAIN
    return {
        name: getattr(asked, name)
        for name in ("top_k", "threshold", "long_text")
        if getattr(asked, name) != getattr(defaults, name)
    }
