"""Spoilt lines through the writer into PostgreSQL: each is stored, put aside, or says nothing; none vanishes."""

import itertools
import random
from pathlib import Path

from benchmarks.fuzz import as_received, check_stored, good_lines, spoilt
from benchmarks.ingest import open_desk
from ingest.parse import Bad, parse_line
from overtone.db import Database


async def test_every_spoilt_line_is_accounted_for(fresh_database: Database, tmp_path: Path) -> None:
    dice = random.Random(12)
    lines = as_received(dice, list(itertools.islice(spoilt(dice, good_lines()), 1_500)))
    async with open_desk(fresh_database, tmp_path) as desk:
        await desk.store(lines)
    await check_stored(fresh_database, lines)
    bad = {one.raw for line in lines if isinstance(one := parse_line(line), Bad)}
    async with fresh_database.acquire() as connection:
        reasons = {row[0] for row in await connection.fetch("SELECT reason FROM overtone.dead_letters")}
    assert len(bad) > 100
    assert {"not_json", "no_post_id", "no_text"} <= reasons
