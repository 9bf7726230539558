"""Re-scoring without a database: how fast, what becomes of texts that the model fails on, and what is shown."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from overtone.engine import FakeEngine
from overtone.errors import DatabaseUnavailableError, EngineError
from train.rescore import Report, Wanted, _cause, conclude, showing
from train.stages import Pace, scores_of

REPORT = Report("tiny-1", stored=500, planned=400, read=300, written=299, seconds=2.0)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_no_more_posts_a_second_pass_than_are_wished() -> None:
    clock = Clock()
    pace = Pace(100, clock, clock.sleep)
    for _ in range(5):
        pace.wait_for(200)
    assert clock.now == pytest.approx(8.0), "the first slice is free to go, each later one waits for that before it"
    clock.now += 60
    pace.wait_for(200)
    pace.wait_for(200)
    assert clock.now == pytest.approx(70.0), "time in which nothing was asked for is not made up for"


def test_without_a_rate_nothing_waits() -> None:
    clock = Clock()
    pace = Pace(None, clock, clock.sleep)
    for _ in range(5):
        pace.wait_for(200)
    assert clock.now == 0.0


@pytest.mark.parametrize(("rate", "rows"), [(None, 2000), (1000.0, 2000), (20.0, 200), (0.01, 1)])
def test_slices_are_no_larger_than_the_rate_lets_through_soon(rate: float | None, rows: int) -> None:
    assert Wanted(rate=rate).rows == rows


def test_a_text_that_the_model_fails_on_takes_no_other_with_it() -> None:
    engine = FakeEngine(fail_on=666)
    rows = [[1, 2, 3], [4, 666], [5], [6, 7]]
    found = scores_of(engine, rows)
    assert np.isnan(found).any(axis=1).tolist() == [False, True, False, False]
    whole = scores_of(FakeEngine(), rows)
    np.testing.assert_array_equal(found[[0, 2, 3]], whole[[0, 2, 3]])


def test_lines_come_every_few_seconds_and_the_end_always(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    with showing(console, as_json=False) as follow:
        for _ in range(10):
            follow(REPORT)
    assert printed.getvalue().count("300/400 posts read, 299 predictions written, 150 posts/s") == 1
    conclude(console, REPORT, is_dry_run=False, as_json=False)
    assert printed.getvalue().count("tiny-1: 300/400") == 2

    with showing(console, as_json=True) as follow:
        follow(REPORT)
    conclude(console, REPORT, is_dry_run=True, as_json=True)
    events = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [one["event"] for one in events] == ["rescore.progress", "rescore.planned"]
    assert events[0] | {"event": ""} == {
        "event": "",
        "model_version": "tiny-1",
        "stored": 500,
        "planned": 400,
        "read": 300,
        "written": 299,
        "failed": 0,
        "seconds": 2.0,
        "posts_per_s": 150.0,
    }


def test_a_terminal_shows_a_bar() -> None:
    printed = io.StringIO()
    with showing(Console(file=printed, force_terminal=True, width=120), as_json=False) as follow:
        follow(REPORT)
    assert "300/400" in printed.getvalue()
    assert "150 posts/s" in printed.getvalue()


def test_nothing_to_do_and_failures_are_told() -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    conclude(console, Report("tiny-1", stored=500, planned=0), is_dry_run=False, as_json=False)
    assert printed.getvalue() == "none of 500 stored posts lack a prediction by tiny-1\n"
    with pytest.raises(EngineError, match="failed on 3 posts"):
        conclude(console, Report("tiny-1", 500, 400, 400, 397, 3, 2.0), is_dry_run=False, as_json=False)


def test_the_error_of_a_stage_is_found_under_what_ray_makes_of_it() -> None:
    ours = DatabaseUnavailableError("The database cannot be reached: gone.")
    wrapped = RuntimeError("UDF failed")
    wrapped.__cause__ = ours
    assert _cause(wrapped) is ours
    assert _cause(RuntimeError("a\nactor died")).message == "re-scoring failed: actor died"
