"""`python -m benchmarks.fuzz --minutes 10`: lines as no API should send them, through the parser and into PostgreSQL.

Good lines of every kind are spoilt: bytes changed, cut, doubled and spliced, values replaced by what JSON, UTF-8 or
PostgreSQL cannot bear. Every line is parsed; every tenth batch goes through the product's own writer into a real
PostgreSQL. Nothing may raise, and no line may vanish: what holds a post is stored or a dead letter, what holds none is
a dead letter, a problem or a keep-alive. Equal seeds, equal lines. When one does, it writes the batch down and exits
with 1.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.ingest import open_desk
from ingest.connection import LineSplitter
from ingest.options import StreamOptions
from ingest.parse import Bad, StreamProblem, parse_line
from ingest.posts import Generator
from ingest.simulator.answers import ERROR_LINE, OPERATIONAL_DISCONNECT, TOO_MANY_CONNECTIONS
from ingest.store import MAX_DEAD_LETTER_BYTES
from ingest.timeline import Timeline, to_line
from overtone.db.database import Database
from overtone.db.embedded import EmbeddedPostgres
from overtone.db.migrate import upgrade
from overtone.db.payload import json_text, raw_of
from overtone.errors import DataError
from overtone.schema import Post

BATCH_LINES = 500
_STORED_EVERY = 10
_FIELDS = frozenset({"author_id", "created_at", "lang", "conversation_id", "public_metrics", "note_tweet", "geo"})

_NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**63 - 1, 2**63, 2**64, 10**400, -(10**30), 1e308, 0.1),
    *("", " ", "\x00", "\ud800", "\udfff\ud800", "a\x00b", "\u2028", "\ufeff", "💩" * 50, "x" * 70_000),
    *("9" * 5_000, "1" * 19, "\u0663\u0664", "+5", " 7 ", "1_000", "0x10", "NaN", "-0"),
    *("2026-99-99", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01"),
    *([], {}, [[]], [None], {"": ""}, {"id": {}}),
)
_BYTES = (
    *(b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\u0000", b"\\ud83d", b"\\"),
    *(b'"', b"'", b"{", b"[", b"}", b"\r", b"/*", b"-", b"NaN", b"1e999", b"[" * 3_000, b'{"a":' * 1_500),
)

Mutator = Callable[[random.Random, bytes], bytes]


def good_lines(count: int = 400) -> list[bytes]:
    """Lines as the X API sends them: posts, long ones among them, errors and notices."""
    started_at = (datetime.now(UTC) - timedelta(hours=1)).timestamp()
    timeline = Timeline(Generator(seed=3), rate=float(count), started_at=started_at)
    timeline.publish_due(started_at + 1.0)
    rules = [{"id": "1", "tag": "one"}, {"id": "2"}]
    lines = [
        to_line(
            {"data": timeline.post(at, _FIELDS), "includes": {"users": [timeline.user(at)]}, "matching_rules": rules}
        )
        for at in range(timeline.end)
    ]
    notices: list[dict[str, Any]] = [dict(ERROR_LINE), dict(OPERATIONAL_DISCONNECT), dict(TOO_MANY_CONNECTIONS)]
    return [line.rstrip() for line in (*lines, *map(to_line, notices))]


def spoilt(dice: random.Random, lines: Sequence[bytes]) -> Iterator[bytes]:
    """For ever: one of `lines`, good, or spoilt once or several times."""
    while True:
        line = dice.choice(lines)
        for _ in range(dice.choice((0, 1, 1, 1, 2, 3, 6))):
            line = dice.choice(_MUTATORS)(dice, line)
        if dice.random() < 0.1:
            line = _spliced(dice, line, dice.choice(lines))
        yield line


def as_received(dice: random.Random, lines: Sequence[bytes]) -> list[bytes]:
    """The lines that come out of the splitter when `lines` come in pieces, cut anywhere; empty ones are left out."""
    data, splitter, start = b"".join(line + b"\r\n" for line in lines), LineSplitter(StreamOptions().max_line_bytes), 0
    received: list[bytes] = []
    while start < len(data):
        size = dice.choice((1, 7, 100, 4_096, 65_536))
        received += splitter.feed(data[start : start + size])
        start += size
    return [line for line in received if line]


def check_line(raw: bytes) -> str:
    """Parse `raw`, make of a post what would be stored of it, and say in a word what it was.

    Raises:
        Exception: whatever escapes.
    """
    parsed = parse_line(raw)
    if isinstance(parsed, Post):
        try:
            json_text(parsed.payload).encode()
        except ValueError:
            raw_of(parsed)
            return "post_refused"
        parsed.text.encode()
        return "post"
    if isinstance(parsed, Bad):
        return parsed.reason
    return "problem" if isinstance(parsed, StreamProblem) else "keep_alive"


async def check_stored(db: Database, lines: Sequence[bytes]) -> None:
    """Raise DataError unless each of `lines`, which a writer has had, is where it belongs."""
    parsed = [parse_line(line) for line in lines]
    digests = {sha256(one.raw[:MAX_DEAD_LETTER_BYTES]).digest() for one in parsed if isinstance(one, Bad)}
    ids = {one.post_id for one in parsed if isinstance(one, Post)}
    async with db.acquire() as connection:
        letters = await connection.fetch(
            "SELECT digest FROM overtone.dead_letters WHERE digest = ANY($1)", list(digests)
        )
        found = await connection.fetch(
            "SELECT post_id FROM overtone.posts WHERE post_id = ANY($1)"
            " UNION SELECT post_id FROM overtone.dead_letters WHERE post_id = ANY($1)",
            list(ids),
        )
    lost_lines, lost_posts = len(digests) - len(letters), len(ids - {row[0] for row in found})
    if lost_lines or lost_posts:
        raise DataError(f"{lost_lines} bad lines and {lost_posts} posts are nowhere.")


def _changed(dice: random.Random, line: bytes) -> bytes:
    at = dice.randrange(len(line) + 1)
    return line[:at] + bytes([dice.randrange(256)]) + line[at + 1 :]


def _inserted(dice: random.Random, line: bytes) -> bytes:
    at = dice.randrange(len(line) + 1)
    return line[:at] + dice.choice(_BYTES) + line[at:]


def _cut(dice: random.Random, line: bytes) -> bytes:
    first, last = sorted(dice.randrange(len(line) + 1) for _ in range(2))
    return line[:first] + line[last:] if dice.random() < 0.5 else line[:first]


def _doubled(dice: random.Random, line: bytes) -> bytes:
    first, last = sorted(dice.randrange(len(line) + 1) for _ in range(2))
    return line[:last] + line[first:last] * dice.randint(1, 3) + line[last:]


def _spliced(dice: random.Random, line: bytes, other: bytes) -> bytes:
    return line[: dice.randrange(len(line) + 1)] + other[dice.randrange(len(other) + 1) :]


def _revalued(dice: random.Random, line: bytes) -> bytes:
    """One value, or one name, of the JSON replaced by another that is JSON too, as far as it can be written."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return line
    places = list(_places(message))
    if not places:
        return line
    holder, name = dice.choice(places)
    value = dice.choice(_NASTY)
    if isinstance(holder, dict) and dice.random() < 0.2:
        holder[str(value)[:100]] = holder.pop(name)
    else:
        holder[name] = value
    try:
        return json.dumps(message, separators=(",", ":"), ensure_ascii=dice.random() < 0.7).encode(
            "utf-8", "surrogatepass"
        )
    except (ValueError, RecursionError):
        return line


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items if depth < 20 else ():
        yield value, name
        yield from _places(inner, depth + 1)


_MUTATORS: tuple[Mutator, ...] = (_changed, _inserted, _cut, _doubled, _revalued, _revalued, _revalued)


async def fuzz(
    db: Database, folder: Path, *, seconds: float, seed: int, keep: Callable[[bytes], object]
) -> Counter[str]:
    """Fuzz for `seconds`, and return how many lines were what.

    Raises:
        DataError: a line made something raise, or vanished; `keep` has had the lines of its batch.
    """
    dice, seen = random.Random(seed), Counter[str]()
    source, until = spoilt(dice, good_lines()), time.monotonic() + seconds
    async with open_desk(db, folder) as desk:
        number = 0
        while time.monotonic() < until:
            lines = as_received(dice, [next(source) for _ in range(BATCH_LINES)])
            try:
                seen.update(check_line(line) for line in lines)
                if number % _STORED_EVERY == 0:
                    await desk.store(lines)
                    await check_stored(db, lines)
                    seen["lines stored"] += len(lines)
            except Exception as error:
                keep(b"\n".join(lines))
                raise DataError(f"{type(error).__name__} after {seen.total()} lines: {error}") from error
            number += 1
    return seen


def main(
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the lines.")] = 1,
    keep: Annotated[Path, typer.Option(help="Where the lines go that break something.")] = Path("fuzz-failure.txt"),
) -> None:
    """Fuzz the way from received bytes to stored rows."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="ovf-", dir="/tmp") as folder:
        try:
            seen = asyncio.run(_with_database(Path(folder), minutes * 60, seed, keep))
        except DataError as error:
            console.print(f"{error.message} The lines are in {keep}.", markup=False, style="red")
            sys.exit(1)
    total = sum(count for kind, count in seen.items() if kind != "lines stored")
    console.print_json(json.dumps({"lines": total, "seed": seed, **dict(seen.most_common())}))


async def _with_database(folder: Path, seconds: float, seed: int, keep: Path) -> Counter[str]:
    server = EmbeddedPostgres(folder / "data", folder / "s", durable=False)
    url = await asyncio.to_thread(server.start)
    try:
        await upgrade(url)
        db = await Database.open(url, max_size=4)
        try:
            return await fuzz(db, folder, seconds=seconds, seed=seed, keep=keep.write_bytes)
        finally:
            await db.close()
    finally:
        await asyncio.to_thread(server.stop)


if __name__ == "__main__":
    from overtone.logging import configure

    configure("fuzz", "CRITICAL")
    typer.run(main)
