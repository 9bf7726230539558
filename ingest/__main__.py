"""`python -m ingest`: the ingestion in this process, without Ray."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from ingest.options import IngestOptions, load_options, suited_to
from ingest.pipeline import Ingestion
from overtone.errors import ConfigurationError, OvertoneError
from overtone.logging import configure, get_logger
from overtone.settings import Settings, load_settings

_log = get_logger()


def main(arguments: list[str] | None = None) -> int:
    """Ingest until SIGINT or SIGTERM: 0 then, 1 when X refuses for good, 2 when something is set wrongly."""
    parser = argparse.ArgumentParser(
        prog="python -m ingest",
        description="Reads posts from the X API or the simulator, stores them and has them classified. Addresses and "
        "secrets come from the environment: TWITTER_BEARER_TOKEN, X_API_BASE_URL, DATABASE_URL, API_HOST, API_PORT.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of options; may be given several times, a later file wins",
    )
    given = parser.parse_args(arguments)
    configure("ingest", format="console")
    try:
        settings = load_settings()
        options = suited_to(settings.x_api_base_url, load_options(given.config) if given.config else None)
        configure("ingest", settings.log_level, settings.log_format)
        asyncio.run(_ingest(settings, options))
    except ConfigurationError as error:
        _log.error("ingest.not_started", reason=error.message)
        return 2
    except OvertoneError as error:
        _log.error("ingest.ended", code=error.code, reason=error.message)
        return 1
    return 0


async def _ingest(settings: Settings, options: IngestOptions) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Ingestion(settings, options).run(stop)
    _log.info("ingest.stopped")


if __name__ == "__main__":
    sys.exit(main())
