"""The day in which everything goes wrong, in its short form: what was sent and not deleted is stored once."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.day.script import Day, kills, scenario
from benchmarks.day.world import World
from ingest.simulator.faults import COMPLIANCE, KINDS
from ingest.simulator.scenario import parse_scenario

SHORT = Day(posts=12_000, seconds=60.0, seed=7, kills=6, real=1_200)
_BRIEF = {"silence", "drop", "undrop", "withhold", "edit", "scrub_geo"}
"""Faults that leave nothing to compare, or only change what is kept of a post."""


def test_every_fault_is_in_the_script() -> None:
    schedule = parse_scenario(scenario(SHORT)).schedule()
    planned = {fault.kind for _, fault in schedule.timed}
    wanted = {kind for kind in KINDS if not kind.startswith("user_")} - _BRIEF | {"user_suspend"}
    assert {"close", "reset", "disconnect"} & planned
    assert wanted - planned <= {
        "close",
        "reset",
        "disconnect",
        "error_line",
        "garbage",
        "missing_tag",
        "unknown_fields",
        "partial_error",
    }
    assert planned & COMPLIANCE
    refusals = {(fault.status, fault.reason) for _, fault in schedule.timed if fault.kind == "refuse"}
    assert {status for status, _ in refusals} == {503, 429, 401}
    assert {reason for status, reason in refusals if status == 429} == {
        "rate_limit",
        "too_many_connections",
        "usage_cap",
    }
    assert {victim for _, victim in kills(SHORT)} == {"ingest", "api", "postgres"}
    assert kills(SHORT) == kills(SHORT)


@pytest.mark.timeout(600)
async def test_a_day_of_every_fault_adds_up() -> None:
    with TemporaryDirectory(prefix="overtone-day-", dir="/tmp") as folder:
        async with World(Path(folder), SHORT, ingest_processes=2) as world:
            verdict = await world.live_through(patience_s=400)
    assert verdict.is_whole, verdict.shown()
    assert verdict.published == SHORT.posts
    assert verdict.stored == verdict.predicted == verdict.published - verdict.deleted - verdict.missing
    assert verdict.deleted > 0
    assert verdict.most_attempts <= 50
    assert verdict.by_model > 0
    assert set(world.killed) == {"ingest", "api", "postgres"}
