"""`python -m benchmarks.ingest`: how fast lines of the stream become stored posts, and how late.

The product's own writer, parser and statements against a PostgreSQL of its own on this machine, durable as in
production. The other side of the ratio writes the same rows, parsed beforehand, by the plainest INSERT of arrays with
ON CONFLICT, without cursor, tallies, tombstones and fence. With `--classify` a server is started, too.
"""

import asyncio
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.classifying import classify_ratio
from benchmarks.load import Target
from benchmarks.results import RESULTS, Result, middle, ratio, write
from benchmarks.server import own_server
from ingest.backlog import Backlog
from ingest.classify import Classifier
from ingest.connection import Inbox
from ingest.ledger import Ledger
from ingest.options import ClassifyOptions, IngestOptions, WriteOptions
from ingest.parse import parse_line
from ingest.posts import Generator
from ingest.predict import PredictClient
from ingest.repair import Repairer
from ingest.store import PostStore
from ingest.timeline import Timeline, to_line
from ingest.waiting import until_true
from ingest.writer import Writer
from overtone.db.database import Database
from overtone.db.embedded import EmbeddedPostgres
from overtone.db.migrate import upgrade
from overtone.db.payload import json_text
from overtone.db.posts import claim_stream
from overtone.errors import DataError
from overtone.logging import configure
from overtone.schema import Post
from overtone.settings import load_settings
from overtone.spool import Spool

OUTPUT = RESULTS.with_name("ingest.json")
AIMS = {
    "ingest.store.posts_per_s": "at least 10000",
    "ingest.store.ratio_to_unnest": "at least 0.5",
    "ingest.store.receive_to_commit_p99_ms": "at most 400",
    "ingest.store.memory_growth_mib": "flat",
    "ingest.classify.ratio_to_server": "at least 0.85",
}
_FIELDS = frozenset({"author_id", "created_at", "lang", "conversation_id", "public_metrics"})
_BARE = (
    "INSERT INTO overtone.posts (post_id, author_id, text, created_at, lang, rule_tags, payload, stream)"
    " SELECT p, a, t, c, l, '{}', j::jsonb, 'bare'"
    " FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[], $5::text[], $6::text[])"
    " AS r (p, a, t, c, l, j) ON CONFLICT (post_id) DO NOTHING"
)
_STREAM = "benchmark"
_DIFFERENT = 5_000.0

_console = Console(stderr=True)


def main(
    posts: Annotated[int, typer.Option(min=1_000, help="Posts of each side in a round.")] = 50_000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds; each side has its turn in each.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="How long posts come at 250 a second, for the delay.")] = 20.0,
    classify: Annotated[int, typer.Option(min=0, help="Posts that are classified in a round; 0 for none.")] = 0,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = OUTPUT,
) -> None:
    """Measure and write the results."""
    configure("benchmark", "WARNING", "console")
    with tempfile.TemporaryDirectory(prefix="ovi-", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        home = Path(folder) / "home"
        home.mkdir()
        target = stack.enter_context(own_server(load_settings(), home)) if classify else None
        asked = _Effort(posts, rounds, seconds, classify, target)
        results = asyncio.run(_measure(Path(folder), asked))
    write(results, output, model_version="none", quick=False)
    table = Table("measured", "value", "aim", box=None)
    for name, result in results.items():
        table.add_row(name, f"{result.value:g} {result.unit}", AIMS[name])
    _console.print(table)


@dataclass(frozen=True, slots=True)
class _Effort:
    """How much is measured."""

    posts: int
    rounds: int
    seconds: float
    classified: int
    target: Target | None


async def _measure(folder: Path, effort: _Effort) -> dict[str, Result]:
    server = EmbeddedPostgres(folder / "data", folder / "s")
    url = await asyncio.to_thread(server.start)
    try:
        await upgrade(url)
        db = await Database.open(url, max_size=8)
        try:
            source = Source()
            results = await _store_rounds(db, source, folder, effort)
            if effort.target is not None:
                count, rounds = effort.classified, range(effort.rounds)
                pairs = [(source.posts(count), source.posts(count)) for _ in rounds]
                results["ingest.classify.ratio_to_server"] = await classify_ratio(db, effort.target, pairs)
            return results
        finally:
            await db.close()
    finally:
        await asyncio.to_thread(server.stop)


async def _store_rounds(db: Database, source: "Source", folder: Path, effort: _Effort) -> dict[str, Result]:
    posts, rounds = effort.posts, effort.rounds
    async with open_desk(db, folder) as desk:
        # The other side holds a round of parsed posts, which makes the process larger once and for all.
        await _bare(db, source.posts(posts))
        await desk.throughput(source.lines(2_000))
        ours, bare, memory = list[float](), list[float](), list[float]()
        for number in range(rounds):
            _console.print(f"round {number + 1} of {rounds}")
            ours.append(await desk.throughput(source.lines(posts)))
            gc.collect()
            memory.append(round(psutil.Process().memory_info().rss / 2**20, 1))
            bare.append(await _bare(db, source.posts(posts)))
        # What the rounds left to write to the disk is not the load whose delay is measured.
        async with db.acquire() as connection:
            await connection.execute("CHECKPOINT")
        delays = await desk.delays(source.lines(int(effort.seconds * 250)), 250.0)
    cuts = statistics.quantiles(delays, n=100)
    return {
        "ingest.store.posts_per_s": Result(middle(ours, 0), "posts/s", True, {"samples": ours, "posts": posts}),
        "ingest.store.ratio_to_unnest": ratio(ours, bare, bare_posts_per_s=bare),
        "ingest.store.receive_to_commit_p99_ms": Result(
            round(cuts[98] * 1000, 1), "ms", False, {"p50_ms": round(cuts[49] * 1000, 1), "posts_per_s": 250}
        ),
        "ingest.store.memory_growth_mib": Result(
            round(memory[-1] - memory[0], 1), "MiB", False, {"samples": memory, "posts_a_sample": posts}
        ),
    }


class Source:
    """Lines as the stream would send them, of ever new posts: some thousand, again and again under other ids."""

    def __init__(self, back: timedelta = timedelta(hours=1)) -> None:
        """The first posts are from so long ago, and each thousand is older than the one before it."""
        started_at = (datetime.now(UTC) - back).timestamp()
        timeline = Timeline(Generator(seed=1), rate=_DIFFERENT, started_at=started_at)
        timeline.publish_due(started_at + 1.0)
        rules = [{"id": "1", "tag": "benchmark"}]
        self._ids = [timeline.post_id(position) for position in range(timeline.end)]
        self._lines = [
            to_line({"data": timeline.post(position, _FIELDS), "matching_rules": rules}).rstrip()
            for position in range(timeline.end)
        ]
        self._given = 0

    def lines(self, count: int) -> list[bytes]:
        """The next `count` lines."""
        made = [self._line(number) for number in range(self._given, self._given + count)]
        self._given += count
        return made

    def posts(self, count: int) -> list[Post]:
        """What the next `count` lines hold."""
        return [one for line in self.lines(count) if isinstance(one := parse_line(line), Post)]

    def _line(self, number: int) -> bytes:
        turn, index = divmod(number, len(self._ids))
        post_id = self._ids[index]
        earlier = turn * (self._ids[-1] - self._ids[0] + 1)
        return self._lines[index].replace(b"%d" % post_id, b"%d" % (post_id - earlier))


class _NoClassifier(Classifier):
    """Lets posts be stored and no more."""

    def offer(self, posts: Iterable[Post]) -> None:
        """Nothing is classified here."""


class _Noted(PostStore):
    """Counts what was stored, and remembers when which post was."""

    stored = 0
    notes = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.stored_at: dict[int, float] = {}

    async def store_once(self, posts: Sequence[Post], *, stream: str, is_repeat: bool = False) -> int:
        """Store, and note."""
        new = await super().store_once(posts, stream=stream, is_repeat=is_repeat)
        self.stored += new
        if self.notes:
            now = time.perf_counter()
            self.stored_at.update((post.post_id, now) for post in posts)
        return new


class Desk:
    """A writer at work, and the inbox that it empties."""

    def __init__(self, inbox: Inbox, store: _Noted, writer: Writer, task: "asyncio.Task[None]") -> None:
        self._inbox = inbox
        self._store = store
        self._writer = writer
        self._task = task

    async def store(self, lines: Sequence[bytes]) -> None:
        """Have `lines` stored, whatever they hold; raises what made the writer end."""
        for line in lines:
            self._inbox.put_nowait(line)
        await until_true(lambda: self._writer.is_idle or self._task.done(), every_s=0.005)
        if self._task.done():
            self._task.result()

    async def throughput(self, lines: Sequence[bytes]) -> float:
        """Posts a second when all of `lines` are there at once."""
        wanted = self._store.stored + len(lines)
        began = time.perf_counter()
        for line in lines:
            self._inbox.put_nowait(line)
        await until_true(lambda: self._store.stored >= wanted, every_s=0.005)
        return len(lines) / (time.perf_counter() - began)

    async def delays(self, lines: Sequence[bytes], rate: float) -> list[float]:
        """Seconds from receipt to commit of each post, when `rate` of them come a second."""
        received: dict[int, float] = {}
        self._store.notes = True
        began = time.perf_counter()
        for number, line in enumerate(lines):
            await asyncio.sleep(max(began + number / rate - time.perf_counter(), 0.0))
            parsed = parse_line(line)
            assert isinstance(parsed, Post)
            received[parsed.post_id] = time.perf_counter()
            self._inbox.put_nowait(line)
        await until_true(lambda: len(self._store.stored_at) >= len(lines))
        return [self._store.stored_at[post_id] - moment for post_id, moment in received.items()]


@asynccontextmanager
async def open_desk(db: Database, folder: Path, stream: str = _STREAM) -> AsyncIterator["Desk"]:
    """The product's writer of `stream` at work on `db`, with its spool in `folder`; nothing is classified."""
    epoch = await claim_stream(db, stream)
    client = PredictClient("http://127.0.0.1:1", "X-API-Key", lambda: "")
    store = _Noted(db, _NoClassifier(db, client, ClassifyOptions()), epoch=epoch)
    ledger = Ledger(db, stream, epoch)
    repairer = Repairer(ledger, None, options=IngestOptions(), found=None)  # type: ignore[arg-type]
    inbox: Inbox = asyncio.Queue()
    backlog = Backlog(Spool(folder / "spool", 2**30))
    writer = Writer(inbox, backlog, store, repairer, stream=stream, options=WriteOptions())
    task = asyncio.create_task(writer.run())
    try:
        yield Desk(inbox, store, writer, task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        backlog.close()


async def _bare(db: Database, posts: Sequence[Post]) -> float:
    rows = [
        (post.post_id, post.author_id, post.text, post.created_at, post.lang, json_text(post.payload)) for post in posts
    ]
    size = WriteOptions().batch_rows
    batches = [list(zip(*rows[start : start + size], strict=True)) for start in range(0, len(rows), size)]
    began, stored = time.perf_counter(), 0
    for batch in batches:
        async with db.transaction() as connection:
            stored += int((await connection.execute(_BARE, *batch)).rpartition(" ")[2])
    if stored != len(rows):
        raise DataError(f"{len(rows)} posts were to be stored, and {stored} were.")
    return stored / (time.perf_counter() - began)


if __name__ == "__main__":
    typer.run(main)
