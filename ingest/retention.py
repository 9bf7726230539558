"""Retention beside the stream, so that nobody has to schedule it: the leader applies the limits of the settings."""

import asyncio
import time

import asyncpg

from ingest.options import RetentionOptions
from overtone import metrics
from overtone.archive import ParquetArchive
from overtone.db.database import Database
from overtone.db.retention import Limits, retain
from overtone.errors import OvertoneError
from overtone.logging import get_logger
from overtone.settings import Settings

_log = get_logger()


class RetentionKeeper:
    """Makes and drops months every so often."""

    def __init__(self, db: Database, settings: Settings, options: RetentionOptions) -> None:
        self._db = db
        self._limits = Limits(settings.retention_posts_months, settings.retention_predictions_months)
        self._archive_url = settings.archive_url
        self._options = options

    async def run(self) -> None:
        """Keep to the limits until cancelled. A failure is logged, drops nothing, and is tried again."""
        if not self._options.every_s:
            await asyncio.Event().wait()
        await asyncio.sleep(min(self._options.first_after_s, self._options.every_s))
        while True:
            is_done = await self.keep()
            await asyncio.sleep(self._options.every_s if is_done else self._options.again_after_s)

    async def keep(self) -> bool:
        """Apply the limits once; whether that went well."""
        try:
            archive = ParquetArchive(self._archive_url) if self._archive_url else None
            await retain(self._db, self._limits, archive.keep if archive else None)
        except OvertoneError as error:
            _log.error("retention.failed", code=error.code, reason=error.message)
        except (asyncpg.PostgresError, OSError) as error:
            _log.error("retention.failed", code="internal", reason=type(error).__name__)
        else:
            metrics.RETENTION_DONE.set(time.time())
            return True
        return False
