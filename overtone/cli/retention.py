"""`overtone db retention`: months that are over their limit go, and the next ones are made."""

import asyncio
import json
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape

from overtone.archive import ParquetArchive
from overtone.cli.database import reachable_database
from overtone.db.database import Database
from overtone.db.retention import Limits, RetentionReport, plan_retention, retain
from overtone.settings import Settings


def run_retention(settings: Settings, console: Console, *, is_dry_run: bool, as_json: bool) -> int:
    """Apply the limits of the settings, or say what that would do.

    Raises:
        ConfigurationError, EnvironmentProblemError: the archive cannot be used; nothing is dropped.
    """
    limits = Limits(settings.retention_posts_months, settings.retention_predictions_months)
    archive = ParquetArchive(settings.archive_url) if settings.archive_url and not is_dry_run else None

    async def work(url: str) -> RetentionReport:
        db = await Database.open(url, max_size=2, application_name="overtone-retention")
        try:
            if is_dry_run:
                return await plan_retention(db, limits, datetime.now(UTC))
            return await retain(db, limits, archive.keep if archive else None)
        finally:
            await db.close()

    with reachable_database(settings) as url:
        report = asyncio.run(work(url))
    if as_json:
        console.print_json(json.dumps({"dry_run": is_dry_run, **asdict(report)}))
        return 0
    done = "Would drop" if is_dry_run else "Dropped"
    console.print(f"{done}: {escape(', '.join(report.dropped) or 'nothing')}; {report.dead_letters} dead letters.")
    for name, rows in report.archived_rows.items():
        console.print(f"Archived {rows} rows of {name}.", highlight=False)
    return 0
