"""`python -m benchmarks.day`: live through a day and print the account as JSON; 1 if it does not add up."""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.day.script import Day
from benchmarks.day.world import World


async def _live(day: Day, folder: Path, processes: int, patience_s: float) -> int:
    current = asyncio.current_task()
    assert current is not None
    # Whoever stops the day stops its processes, too.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
    async with World(folder, day, processes) as world:
        verdict = await world.live_through(patience_s=patience_s)
    Console().print_json(json.dumps({**verdict.shown(), "killed": world.killed}))
    return 0 if verdict.is_whole else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.day", description=__doc__)
    parser.add_argument("--posts", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long posts are published (default: 30)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kills", type=int, default=18, help="kill -9 of ingestion, API and PostgreSQL (default: 18)")
    parser.add_argument("--ingest", type=int, default=1, help="processes of the ingestion (default: 1)")
    parser.add_argument("--real", type=int, default=0, help="posts that the model classifies (default: none)")
    parser.add_argument("--outage", type=float, default=0.0, help="seconds for which PostgreSQL is gone once")
    parser.add_argument(
        "--plan", choices=("self_serve", "enterprise"), default="self_serve", help="how gaps are filled"
    )
    parser.add_argument("--patience", type=float, default=900.0, help="seconds to wait for order afterwards")
    parser.add_argument("--folder", type=Path, help="where data and logs go (default: a temporary folder)")
    given = parser.parse_args(arguments)
    day = Day(given.posts, given.minutes * 60, given.seed, given.kills, given.real, given.outage, given.plan)
    if given.folder is not None:
        return asyncio.run(_live(day, given.folder.absolute(), given.ingest, given.patience))
    with tempfile.TemporaryDirectory(prefix="overtone-day-", dir="/tmp") as folder:
        return asyncio.run(_live(day, Path(folder), given.ingest, given.patience))


if __name__ == "__main__":
    sys.exit(main())
