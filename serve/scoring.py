"""Scoring jobs chunk by chunk, and what keeps jobs going when processes and the broker do not.

The texts are classified through the API, as a streamed batch: they go the bulk way of the batcher, behind whoever waits
for an answer, and no consumer has an engine of its own. It knows neither Ray nor Celery.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import UUID, uuid4

import aiohttp
import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_exponential

from overtone import metrics
from overtone.db import jobs
from overtone.db.database import Database
from overtone.db.jobs import ChunkName, Claim, Finished, Holders
from overtone.errors import BundleError, InvalidInputError, OvertoneError, UnauthorizedError, UnavailableError
from overtone.job_files import JobFolder, Row, ids_of, job_folders
from overtone.logging import get_logger
from serve.chores import CHORE
from serve.rescoring import RESCORING, Rescorer

SCORE = "score_chunk"
"""The task that does a chunk: the job's id and the chunk's number."""
SCORING = "score"
"""The kind of job that has an upload and a result."""
CHUNKED = frozenset({SCORING, RESCORING})
"""The kinds that are done by that task; every other is a chore."""
OPTIONS = ("top_k", "threshold", "long_text")
"""Options of a prediction that a job may have."""

_PASSING = frozenset({"overloaded", "deadline_exceeded", "unavailable", "shutting_down", "database_unavailable"})
_log = get_logger()

Outcome = Literal["done", "skipped"]


class Classify(Protocol):
    """Classifies texts."""

    def __call__(self, texts: Sequence[str], options: Mapping[str, Any]) -> "AsyncIterator[dict[str, Any]]":
        """A prediction, or an object with `error`, for each text, in order."""
        ...


class ApiClassifier:
    """`POST /predict/batch` at `base_url`, line by line."""

    def __init__(self, base_url: str, header: str, read_key: Callable[[], str], *, silence_s: float = 660.0) -> None:
        """`silence_s`: how long no line of the answer may come; the API itself gives up on a line after 600 s."""
        self._url = f"{base_url}/predict/batch"
        self._header = header
        self._read_key = read_key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=silence_s)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, texts: Sequence[str], options: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """See `Classify`.

        Raises:
            InvalidInputError: the API will never take this request.
            UnauthorizedError: it refuses the key.
            UnavailableError: it is away, full, or the answer ended early.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        headers = {self._header: self._read_key(), "Content-Type": "application/x-ndjson"}
        body = b"".join(orjson.dumps(text, option=orjson.OPT_APPEND_NEWLINE) for text in texts)
        count = 0
        try:
            async with self._session.post(
                self._url, data=body, headers=headers, params={name: str(value) for name, value in options.items()}
            ) as response:
                if response.status != 200:
                    raise _failure(response.status, await response.read())
                async for line in _lines(response.content):
                    answer = orjson.loads(line)
                    if answer.get("ended") or _is_passing(answer):
                        raise UnavailableError(f"The API gave up on a line: {answer['error'].get('code')}.")
                    count += 1
                    yield answer
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise UnavailableError(f"The API cannot be reached: {type(error).__name__}.") from error
        if count != len(texts):
            raise UnavailableError(f"The API answered {count} of {len(texts)} lines.")

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()


@dataclass(slots=True)
class Scorer:
    """Does chunks."""

    db: Database
    root: Path
    """Folder of all jobs."""
    classify: Classify
    holders: Holders = field(default_factory=Holders)
    patience_s: float = 60.0
    """How long an attempt waits for an API that is away, before the broker's own retries."""
    pause_s: float = 0.5
    """See `Rescorer`."""

    async def score(self, name: ChunkName, *, is_last_try: bool = False) -> Outcome:
        """Do a chunk of a job of a kind in `CHUNKED`, unless that was done or is being done, or the job has ended.

        Raises:
            OvertoneError: it cannot be done now; on the last try, or if trying again cannot help, the job has failed.
        """
        holder = uuid4()
        claim = await jobs.claim_chunk(self.db, name, holder, self.holders.hold_s)
        if claim is None:
            metrics.JOB_CHUNKS.labels("skipped").inc()
            return "skipped"
        is_rescoring = claim.kind == RESCORING
        work = Rescorer(self.db, self._classified, self.pause_s).do if is_rescoring else self._score
        with self.holders.holding(holder):
            try:
                state = await work(name, claim)
            except Exception as error:
                metrics.JOB_CHUNKS.labels("failed").inc()
                await self._give_up(name, holder, error, is_last_try=is_last_try)
                raise
        metrics.JOB_CHUNKS.labels("done" if state else "skipped").inc()
        return "done" if state else "skipped"

    async def _score(self, name: ChunkName, claim: Claim) -> jobs.State | None:
        folder = JobFolder(self.root, name.job_id)
        try:
            rows = await asyncio.to_thread(folder.read_input, name.number)
        except OSError as error:
            raise UnavailableError("The files of the job cannot be read: consumers need JOBS_FOLDER too.") from error
        options = {key: claim.parameters[key] for key in OPTIONS if key in claim.parameters}
        answers = await self._classified([row["text"] for row in rows if "text" in row], options)
        given = iter(answers)
        shown = [_shown(row, next(given) if "text" in row else {"error": row["error"]}) for row in rows]
        failed = sum("error" in row for row in shown)
        done = Finished(
            claim.items,
            failed,
            # What was wrong with the upload is in the job already.
            [_problem(row) for row, given in zip(shown, rows, strict=True) if "error" in row and "text" in given],
            {one for row in rows for one in ids_of(row)},
        )

        def keep(erased: Collection[int]) -> None:
            kept = [row for row in shown if not erased or ids_of(row).isdisjoint(erased)]
            lines = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in kept)
            try:
                folder.write_result(name.number, lines)
            except OSError as error:
                raise UnavailableError(f"The result cannot be kept: {error.strerror}.") from error

        state = await jobs.finish_chunk(self.db, name, done, keep)
        if state is not None:
            metrics.JOB_TEXTS.labels("classified").inc(claim.items - failed)
            metrics.JOB_TEXTS.labels("failed").inc(failed)
            await asyncio.to_thread(folder.drop_input, name.number)
        if state == "succeeded":
            await asyncio.to_thread(folder.drop_inputs)
            _log.info("job.succeeded", job_id=str(name.job_id))
        return state

    async def _classified(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        trying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_exponential(multiplier=0.5, max=10.0),
            stop=stop_before_delay(self.patience_s),
            reraise=True,
        )

        async def once() -> list[dict[str, Any]]:
            return [answer async for answer in self.classify(texts, options)]

        return await trying(once) if texts else []

    async def _give_up(self, name: ChunkName, holder: UUID, error: Exception, *, is_last_try: bool) -> None:
        code = error.code if isinstance(error, OvertoneError) else "internal"
        _log.warning("chunk.failed", job_id=str(name.job_id), chunk=name.number, code=code, is_last_try=is_last_try)
        with contextlib.suppress(OvertoneError):
            await jobs.release_chunk(self.db, name, holder, retry_within_s=60.0)
            if is_last_try or is_hopeless(error):
                why = error.message if isinstance(error, OvertoneError) else "A consumer failed."
                await jobs.end_job(self.db, name.job_id, "failed", f"Chunk {name.number}: {why}")


class Queue(Protocol):
    """What gives tasks to consumers; see `serve.broker.Broker`. Blocking."""

    def send(self, task: str, arguments: Sequence[Any]) -> None: ...
    def lengths(self) -> Mapping[str, int]: ...


@dataclass(slots=True)
class Dispatcher:
    """Gives the broker the chunks that are due, and removes what nobody needs any more.

    The database is the truth: what the broker or a consumer lost is given again. Any number may run at once.
    """

    db: Database
    queue: Queue
    root: Path
    queue_name: str
    window: int = 64
    """Chunks of one job that wait at a time."""
    lost_after_s: float = 15.0
    """A chunk that was queued so long ago, while the queue is empty, was lost on the way."""
    lost_at_last_s: float = 600.0
    """The same whatever the queue holds."""
    keep_days: int = 7
    """How long jobs are kept after their end; 0 for ever."""
    waiting: int = 0
    """Tasks in the queue, when it was last seen."""
    _is_away: bool = False

    async def step(self) -> int:
        """Give what is due; return how many chunks that was.

        Raises:
            DatabaseUnavailableError: nothing was given.
        """
        try:
            lengths = await asyncio.to_thread(self.queue.lengths)
        except UnavailableError as error:
            self._note(error)
            return 0
        self._note(None)
        for name, length in lengths.items():
            metrics.CELERY_QUEUE.labels(name).set(length)
        self.waiting = lengths[self.queue_name]
        lost_after_s = self.lost_at_last_s if self.waiting else self.lost_after_s
        due = await jobs.due_chunks(self.db, window=self.window, lost_after_s=lost_after_s)
        for number, one in enumerate(due):
            task = SCORE if one.kind in CHUNKED else CHORE
            try:
                await asyncio.to_thread(self.queue.send, task, [str(one.name.job_id), one.name.number])
            except UnavailableError as error:
                self._note(error)
                await jobs.unqueue_chunks(self.db, [rest.name for rest in due[number:]])
                return number
        return len(due)

    async def tidy(self) -> None:
        """Remove old jobs, the texts of jobs that need them no more, and uploads that never became a job."""
        if self.keep_days:
            for job_id in await jobs.delete_old_jobs(self.db, self.keep_days):
                await asyncio.to_thread(JobFolder(self.root, job_id).drop)
        folders = {folder.job_id: folder for folder in await asyncio.to_thread(lambda: list(job_folders(self.root)))}
        states = await jobs.known_jobs(self.db, folders)
        for job_id, folder in folders.items():
            state = states.get(job_id)
            if state is None and await asyncio.to_thread(_is_old, folder.path):
                await asyncio.to_thread(folder.drop)
            elif state in {"succeeded", "cancelled"}:
                await asyncio.to_thread(folder.drop_inputs)

    def _note(self, error: UnavailableError | None) -> None:
        if error is not None and not self._is_away:
            _log.warning("broker.lost", reason=error.message)
        elif error is None and self._is_away:
            _log.info("broker.found")
        self._is_away = error is not None


def is_hopeless(error: Exception) -> bool:
    """Whether trying again cannot help."""
    return isinstance(error, InvalidInputError | BundleError)


def _shown(row: Row, answer: Mapping[str, Any]) -> Row:
    """A line of the result: which line it is for, then the prediction or the error."""
    named = {name: value for name, value in row.items() if name not in {"text", "error"}}
    if "error" not in answer:
        return named | dict(answer)
    error = answer["error"]
    return named | {"error": {name: error[name] for name in ("code", "detail") if name in error}}


def _problem(row: Row) -> dict[str, Any]:
    return {"line": row["line"], "field": "text", "problem": row["error"].get("detail") or row["error"].get("code")}


def _is_passing(answer: Mapping[str, Any]) -> bool:
    error = answer.get("error")
    return isinstance(error, dict) and error.get("code") in _PASSING


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    held = b""
    async for piece in content.iter_any():
        *ended, held = (held + piece).split(b"\n")
        for line in ended:
            yield line
    if held:
        raise UnavailableError("The answer of the API ended in the middle of a line.")


def _failure(status: int, body: bytes) -> OvertoneError:
    try:
        detail = str(orjson.loads(body)["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        detail = "no detail given"
    if status in {401, 403}:
        return UnauthorizedError(f"The API refuses the key ({status}): {detail}")
    if status in {400, 413, 415, 422}:
        return InvalidInputError(f"The API refuses the texts ({status}): {detail}")
    return UnavailableError(f"The API answers {status}: {detail}")


def _is_old(path: Path, *, seconds: float = 86_400.0) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:
        return False
