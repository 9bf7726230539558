"""Chores of the installation, as jobs of one chunk: consumers do them with the functions that commands call too.

Each may be done twice without harm, as at-least-once delivery needs it.
"""

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from overtone.archive import ParquetArchive
from overtone.db import jobs
from overtone.db.database import Database
from overtone.db.jobs import ChunkName
from overtone.db.report import make_report
from overtone.db.retention import Limits, retain
from overtone.erasure import open_eraser
from overtone.errors import ConfigurationError, InvalidInputError, OvertoneError
from overtone.logging import get_logger
from overtone.settings import Settings

CHORE = "do_chore"
"""The task that does a chore: the job's id and the chunk's number, which is 1."""
RETENTION = "retention"
ERASURE = "erasure"
REPORT = "report"

Chore = Callable[[Settings, Database, Mapping[str, Any]], Awaitable[dict[str, Any]]]

_log = get_logger()


class Chores:
    """Does chores, and holds them meanwhile."""

    def __init__(self, settings: Settings, db: Database, holders: jobs.Holders) -> None:
        self._settings = settings
        self._db = db
        self._holders = holders

    async def do(self, name: ChunkName, *, is_last_try: bool = False) -> str:
        """Do the chore of a job, unless that was done or is being done; `done` or `skipped`.

        Raises:
            OvertoneError: it cannot be done now; on the last try, or if trying again cannot help, the job has failed.
        """
        holder = uuid4()
        claim = await jobs.claim_chunk(self._db, name, holder, self._holders.hold_s)
        if claim is None:
            return "skipped"
        with self._holders.holding(holder):
            try:
                outcome = await CHORES[claim.kind](self._settings, self._db, claim.parameters)
            except Exception as error:
                is_last = is_last_try or isinstance(error, InvalidInputError | ConfigurationError)
                await self._give_up(name, holder, error, is_last=is_last)
                raise
        is_counted = await jobs.finish_chore(self._db, name, outcome)
        _log.info("chore.done", job_id=str(name.job_id), kind=claim.kind)
        return "done" if is_counted else "skipped"

    async def _give_up(self, name: ChunkName, holder: Any, error: Exception, *, is_last: bool) -> None:
        code = error.code if isinstance(error, OvertoneError) else "internal"
        _log.warning("chore.failed", job_id=str(name.job_id), code=code, is_last_try=is_last)
        with contextlib.suppress(OvertoneError):
            await jobs.release_chunk(self._db, name, holder, retry_within_s=60.0)
            if is_last:
                why = error.message if isinstance(error, OvertoneError) else "A consumer failed."
                await jobs.end_job(self._db, name.job_id, "failed", why)


async def _retain(settings: Settings, db: Database, _parameters: Mapping[str, Any]) -> dict[str, Any]:
    limits = Limits(settings.retention_posts_months, settings.retention_predictions_months)
    archive = ParquetArchive(settings.archive_url) if settings.archive_url else None
    return asdict(await retain(db, limits, archive.keep if archive else None))


async def _erase(settings: Settings, db: Database, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return await open_eraser(settings, db).erase(
        parameters["kind"], int(parameters["id"]), actor=str(parameters["actor"])
    )


async def _report(_settings: Settings, db: Database, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return await make_report(db, days=int(parameters["days"]))


CHORES: Mapping[str, Chore] = {RETENTION: _retain, ERASURE: _erase, REPORT: _report}
"""What does a job of each kind."""
