"""The writer and its spool: what cannot be stored waits on disk, in order, and is stored once."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ingest.backlog import Backlog
from ingest.connection import Connected, Disconnected, Inbox, StreamEvent
from ingest.options import IngestOptions, WriteOptions
from ingest.repair import Repairer
from ingest.salvage import salvage
from ingest.store import PostStore
from ingest.writer import Step, Writer, steps
from overtone.errors import DatabaseUnavailableError
from overtone.schema import Post
from overtone.spool import Record, Spool

MIB = 2**20
OPTIONS = WriteOptions(batch_rows=10, flush_s=0.01)
USUAL = WriteOptions(flush_s=0.01)


class Book:
    """Stands for the database: what was written, in order; `is_away` refuses."""

    def __init__(self) -> None:
        self.is_away = False
        self.said: list[str] = []

    def write(self, *words: str) -> None:
        if self.is_away:
            raise DatabaseUnavailableError
        self.said += words


class BookStore(PostStore):
    def __init__(self, book: Book) -> None:
        super().__init__(None, None, epoch=1)  # type: ignore[arg-type]
        self.book = book

    async def store_once(self, posts: Sequence[Post], *, stream: str, is_repeat: bool = False) -> int:
        self.book.write(*(post.text for post in posts))
        return len(posts)


class BookRepairer(Repairer):
    def __init__(self, book: Book) -> None:
        super().__init__(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            options=IngestOptions(),
            found=None,  # type: ignore[arg-type]
        )
        self.book = book

    async def note_disconnected(self, cause: str) -> None:
        self.book.write(f"-{cause}")

    async def note_connected(self, at: datetime, *, is_backfilled: bool = False) -> None:
        self.book.write("+")


class Desk:
    """A writer at work on a folder."""

    def __init__(self, folder: Path, book: Book, max_bytes: int = MIB, options: WriteOptions = OPTIONS) -> None:
        self.inbox: Inbox = asyncio.Queue(100_000)
        self.backlog = Backlog(Spool(folder, max_bytes))
        self.writer = Writer(self.inbox, self.backlog, BookStore(book), BookRepairer(book), stream="s", options=options)
        self.task = asyncio.create_task(self.writer.run())

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.backlog.close()


def line(number: int) -> bytes:
    return json.dumps({"data": {"id": str(number), "text": str(number)}}).encode()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  it spans a queue and files
            await asyncio.sleep(0.005)


@pytest.fixture
async def open_desk(tmp_path: Path) -> AsyncIterator[Callable[..., Desk]]:
    async with contextlib.AsyncExitStack() as stack:

        def make(book: Book, max_bytes: int = MIB, options: WriteOptions = OPTIONS) -> Desk:
            desk = Desk(tmp_path / "spool", book, max_bytes, options)
            stack.push_async_callback(desk.close)
            return desk

        yield make


async def test_what_waits_on_disk_is_stored_in_order(open_desk: Callable[..., Desk]) -> None:
    book = Book()
    desk = open_desk(book)
    desk.inbox.put_nowait(line(1))
    await until(lambda: book.said == ["1"])
    book.is_away = True
    events: list[StreamEvent] = [
        line(2),
        Disconnected("reset"),
        line(3),
        Connected(datetime.now(UTC)),
        *map(line, range(4, 60)),
    ]
    for event in events:
        desk.inbox.put_nowait(event)
    await until(lambda: desk.inbox.empty() and not desk.backlog.is_empty)
    book.is_away = False
    await asyncio.wait_for(desk.writer.finish(), 30)
    assert book.said == ["1", "2", "-reset", "3", "+", *map(str, range(4, 60))]
    desk.inbox.put_nowait(line(60))
    await until(lambda: book.said[-1] == "60")


async def test_ten_minutes_without_the_database_are_stored_in_order(open_desk: Callable[..., Desk]) -> None:
    """As many lines as X sends in that time at its most, 250 a second; memory holds none of them."""
    book, count = Book(), 150_000
    book.is_away = True
    desk = open_desk(book, 256 * MIB, USUAL)
    for start in range(0, count, 10_000):
        for number in range(start + 1, start + 10_001):
            desk.inbox.put_nowait(line(number))
        await until(desk.inbox.empty)
    await until(lambda: desk.backlog.size_bytes > count * 30)
    book.is_away = False
    await asyncio.wait_for(desk.writer.finish(), 250)
    assert book.said == [*map(str, range(1, count + 1))]


async def test_a_killed_process_leaves_its_backlog_to_the_next(tmp_path: Path) -> None:
    book = Book()
    book.is_away = True
    first = Desk(tmp_path / "spool", book)
    for number in range(1, 40):
        first.inbox.put_nowait(line(number))
    await until(lambda: first.inbox.empty() and first.backlog.size_bytes > 39 * 30)
    first.inbox.put_nowait(Disconnected("killed"))
    await until(first.inbox.empty)
    await first.close()
    book.is_away = False
    second = Desk(tmp_path / "spool", book)
    second.inbox.put_nowait(Connected(datetime.now(UTC)))
    await asyncio.wait_for(second.writer.finish(), 30)
    assert book.said == [*map(str, range(1, 40)), "-killed", "+"]
    await second.close()


@pytest.mark.parametrize("max_bytes", [0, 500])
async def test_without_room_on_disk_the_rest_waits_in_memory(open_desk: Callable[..., Desk], max_bytes: int) -> None:
    book = Book()
    book.is_away = True
    desk = open_desk(book, max_bytes)
    for number in range(1, 100):
        desk.inbox.put_nowait(line(number))
    await until(lambda: desk.backlog.size_bytes > max_bytes - 60 and desk.inbox.qsize() <= 90)
    assert desk.backlog.size_bytes <= max_bytes
    assert desk.inbox.qsize() > 0
    book.is_away = False
    await asyncio.wait_for(desk.writer.finish(), 30)
    assert book.said == [*map(str, range(1, 100))]


async def test_damage_becomes_a_gap(open_desk: Callable[..., Desk], tmp_path: Path) -> None:
    book = Book()
    book.is_away = True
    desk = open_desk(book)
    desk.inbox.put_nowait(line(1))
    await until(lambda: not desk.backlog.is_empty)
    for number in (2, 3):
        size = desk.backlog.size_bytes
        desk.inbox.put_nowait(line(number))
        await until(lambda size=size: desk.backlog.size_bytes > size)  # type: ignore[misc]
    path = next((tmp_path / "spool").glob("*.spool"))
    path.write_bytes(path.read_bytes().replace(b'"id": "2"', b'"id": "9"'))
    book.is_away = False
    await asyncio.wait_for(desk.writer.finish(), 30)
    assert book.said == ["1", "-spool_damaged", "+", "3"]


def test_marks_stand_alone_among_runs_of_lines() -> None:
    gone, back = Disconnected("x"), Connected(datetime.now(UTC))
    made: list[Step] = []
    steps([line(1), b"", b"{", gone, back, line(2)], made)
    steps([line(3)], made)
    assert [(step.events, step.mark, [post.post_id for post in step.posts]) for step in made] == [
        (3, None, [1]),
        (1, gone, []),
        (1, back, []),
        (2, None, [2, 3]),
    ]
    assert [len(step.others) for step in made] == [1, 0, 0, 0]


async def test_a_standby_stores_what_was_left_on_disk(tmp_path: Path) -> None:
    book = Book()
    spool = Spool(tmp_path / "spool", MIB)
    spool.append([Record(0, line(1)), Record(2, b"reset"), Record(0, line(2))])
    backlog = Backlog(spool)
    assert await salvage([backlog], BookStore(book), stream="s_spool") == 2
    assert (book.said, backlog.is_empty) == (["1", "2"], True)
    backlog.close()
