"""`overtone compliance`: asking X about what is stored, once."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ingest.compliance import ComplianceApi, Enforcer, SweepResult, sweep
from ingest.options import load_options
from overtone.cli.database import reachable_database
from overtone.db.database import Database
from overtone.erasure import open_eraser
from overtone.errors import ConfigurationError
from overtone.settings import Settings


def sweep_once(settings: Settings, files: tuple[Path, ...], console: Console, *, as_json: bool) -> int:
    """Send all stored ids to X in batch compliance jobs and remove what must go.

    Raises:
        ConfigurationError: there is no bearer token, or an option is wrong.
        StreamError: X cannot be reached, refuses, or fails a job.
    """
    if settings.twitter_bearer_token is None:
        raise ConfigurationError("TWITTER_BEARER_TOKEN is not set: a sweep asks X about the posts that are stored.")
    token, options = settings.twitter_bearer_token.get_secret_value(), load_options(files).compliance

    async def work(url: str) -> SweepResult:
        db = await Database.open(url, max_size=2, application_name="overtone-compliance")
        try:
            eraser = open_eraser(settings, db)
            async with ComplianceApi(settings.x_api_base_url, token) as api:
                return await sweep(api, Enforcer(eraser), eraser, options)
        finally:
            await db.close()

    with reachable_database(settings) as url:
        result = asyncio.run(work(url))
    if as_json:
        console.print_json(json.dumps(asdict(result)))
    else:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(result.reasons.items())) or "none"
        console.print(f"Asked X about {result.asked} posts; had to change or remove: {told}.", highlight=False)
    return 0
