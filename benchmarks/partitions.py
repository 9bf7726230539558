"""`python -m benchmarks.partitions`: posts stored a second by one process, and by several that read by partition.

Each process has the product's own writer, a stream, a cursor and an epoch of its own; all write into one PostgreSQL.
What is compared is the rate of all together with that of the first alone.
"""

import asyncio
import multiprocessing
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.ingest import Source, open_desk
from benchmarks.results import RESULTS, Result, middle, ratio, write
from overtone.db.database import Database
from overtone.db.embedded import EmbeddedPostgres
from overtone.db.migrate import upgrade
from overtone.logging import configure

OUTPUT = RESULTS.with_name("partitions.json")
_APART = timedelta(days=2)
_START_S = 120.0

_console = Console(stderr=True)


def main(
    processes: Annotated[int, typer.Option(min=2, max=20, help="How many read side by side.")] = 2,
    posts: Annotated[int, typer.Option(min=1_000, help="Posts that each process stores in a round.")] = 50_000,
    rounds: Annotated[int, typer.Option(min=1, max=100)] = 3,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = OUTPUT,
) -> None:
    """Measure and write the results."""
    configure("benchmark", "WARNING", "console")
    with tempfile.TemporaryDirectory(prefix="ovp-", dir="/tmp") as name:
        folder = Path(name)
        server = EmbeddedPostgres(folder / "data", folder / "s")
        url = server.start()
        try:
            asyncio.run(upgrade(url))
            alone, together = _measure(url, folder, processes, posts, rounds)
        finally:
            server.stop()
    results = {
        "ingest.partitions.posts_per_s": Result(middle(together, 0), "posts/s", True, {"samples": together}),
        f"ingest.partitions.{processes}_to_1": ratio(together, alone, one_posts_per_s=alone),
    }
    write(results, output, model_version="none", quick=False)
    for key, result in results.items():
        _console.print(f"{key}: {result.value:g} {result.unit}", highlight=False)


def _measure(url: str, folder: Path, processes: int, posts: int, rounds: int) -> tuple[list[float], list[float]]:
    """Posts a second of the first process alone, and of all, once for each round."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    workers = []
    for number in range(processes):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(theirs, url, folder / f"spool-{number}", number), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    for pipe in pipes:
        if not pipe.poll(_START_S):
            raise TimeoutError("a process did not start in time")
        pipe.recv()
    alone, together = list[float](), list[float]()
    for number in range(rounds):
        _console.print(f"round {number + 1} of {rounds}")
        alone.append(_rate(pipes[:1], posts))
        together.append(_rate(pipes, posts))
    for pipe in pipes:
        pipe.send(0)
    for worker in workers:
        worker.join(30)
    return alone, together


def _rate(pipes: list[Connection], posts: int) -> float:
    for pipe in pipes:
        pipe.send(posts)
    for pipe in pipes:
        pipe.recv()
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send(True)
    for pipe in pipes:
        pipe.recv()
    return round(len(pipes) * posts / (time.perf_counter() - began), 1)


def _work(pipe: Connection, url: str, folder: Path, number: int) -> None:
    asyncio.run(_store(pipe, url, folder, number))


async def _store(pipe: Connection, url: str, folder: Path, number: int) -> None:
    """Store as many posts as `pipe` says, once it says to begin; again and again, until it says none."""
    source = Source(timedelta(hours=1) + number * _APART)
    db = await Database.open(url, max_size=4)
    try:
        async with open_desk(db, folder, f"firehose_{number + 1}") as desk:
            await desk.throughput(source.lines(1_000))
            pipe.send(True)
            while count := await asyncio.to_thread(pipe.recv):
                lines = source.lines(count)
                pipe.send(True)
                await asyncio.to_thread(pipe.recv)
                await desk.throughput(lines)
                pipe.send(True)
    finally:
        await db.close()


if __name__ == "__main__":
    typer.run(main)
