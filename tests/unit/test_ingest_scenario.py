"""The simulator's scenarios, rules, windows and ledger: what needs no server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.posts import Generator
from ingest.simulator.command import chosen_options
from ingest.simulator.faults import KINDS, Fault, seconds
from ingest.simulator.feed import _cut_in_characters
from ingest.simulator.ledger import FOUND, GONE, STREAMED, Ledger
from ingest.simulator.limits import Window
from ingest.simulator.matching import RuleSyntaxError, Subject, parse
from ingest.simulator.scenario import load_scenario, parse_scenario
from overtone.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


def test_the_scenarios_that_are_shipped_are_good() -> None:
    files = sorted((ROOT / "configs" / "simulator").glob("*.yaml"))
    assert files
    for file in files:
        assert not load_scenario(file).schedule().is_over


def test_a_seed_decides_what_comes_when() -> None:
    def plan(seed: int) -> list[Any]:
        steps = [{"every": "10s", "until": "5m", "jitter": "5s", "fault": ["close", "reset", "disconnect"]}]
        return list(parse_scenario({"simulator": {"seed": seed}, "steps": steps}).schedule().timed)

    assert plan(1) == plan(1)
    assert plan(1) != plan(2)
    assert len(plan(1)) == 30
    assert {fault.kind for _, fault in plan(1)} == {"close", "reset", "disconnect"}


def test_speed_shortens_times_and_amounts_in_seconds() -> None:
    steps = [{"at": "1h", "fault": "stall", "amount": "10m"}, {"at": 60, "fault": "duplicate", "amount": 10}]
    schedule = parse_scenario({"speed": 60, "steps": steps}).schedule()
    assert [(moment, fault.kind, fault.size) for moment, fault in schedule.timed] == [
        (1.0, "duplicate", 10),
        (60.0, "stall", 10.0),
    ]


def test_steps_come_due_by_time_and_by_posts() -> None:
    schedule = parse_scenario({"steps": [{"at": 1, "fault": "close"}, {"at_post": 5, "fault": "reset"}]}).schedule()
    assert schedule.due(None, 4) == []
    assert [fault.kind for fault in schedule.due(None, 5)] == ["reset"]
    assert not schedule.is_over
    assert [fault.kind for fault in schedule.due(1.5, 5)] == ["close"]
    assert schedule.is_over


@pytest.mark.parametrize(
    ("given_", "complaint"),
    [
        ({"steps": [{"fault": "close"}]}, "steps.1: give exactly one of at, at_post and every"),
        ({"steps": [{"at": 1, "every": 2, "until": 3, "fault": "close"}]}, "exactly one"),
        ({"steps": [{"every": 2, "fault": "close"}]}, "every and until come together"),
        ({"steps": [{"at": 1, "fault": "explode"}]}, "'explode' is no fault; there are close"),
        ({"steps": [{"at": "soon", "fault": "close"}]}, "steps.1.at: must be a time such as"),
        ({"steps": [{"at": 1, "fault": "refuse", "status": 418}]}, "steps.1"),
        ({"steps": [{"at": 1, "fault": "stall", "amount": "2h"}]}, "from 0 to 3600 s"),
        ({"steps": [{"at": 1, "fault": "close", "ids": [1]}]}, "concerns no ids"),
        ({"steps": [{"every": "0.01s", "until": "1h", "fault": "close"}]}, "more than 100000 faults"),
        ({"simulator": {"rate": 0}}, "simulator.rate"),
        ({"simulator": {"limits": {"streams": 3}}}, "none of rules_read"),
        ({"speed": "fast"}, "speed"),
        ({"colour": "red"}, "colour"),
        ([], "ok"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_named(given_: Any, complaint: str) -> None:
    if complaint == "ok":
        assert parse_scenario(given_).steps == ()
        return
    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        parse_scenario(given_, "day.yaml")


def test_a_scenario_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("bad.yaml", "gone.yaml"):
        with pytest.raises(ConfigurationError, match=name):
            load_scenario(tmp_path / name)


def test_what_is_given_wins_over_the_scenario() -> None:
    scenario = parse_scenario({"simulator": {"rate": 7, "seed": 3}})
    options = chosen_options(scenario, rate=9.0, limit=None)
    assert (options.rate, options.seed, options.limit) == (9.0, 3, None)
    with pytest.raises(ConfigurationError, match="rate"):
        chosen_options(scenario, rate=-1)


@pytest.mark.parametrize(("written", "value"), [("90s", 90), ("1h30m", 5400), ("0.5s", 0.5), (3, 3), ("2m", 120)])
def test_times_are_read(written: Any, value: float) -> None:
    assert seconds(written) == value


def test_every_kind_of_fault_can_be_ordered() -> None:
    for kind in KINDS:
        assert 0 <= Fault(kind=kind).size <= KINDS[kind].most


def subject(text: str, **fields: Any) -> Subject:
    return Subject({"text": text, "author_id": "7", "username": "ann", "lang": "en", **fields}, 3)


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("cat", "My Cat sleeps", True),
        ("cat", "concatenate", False),
        ("cat dog", "dog and cat", True),
        ("cat dog", "cat", False),
        ("cat OR dog", "dog", True),
        ("cat -dog", "cat and dog", False),
        ('"good dog"', "a good, dog!", True),
        ('"good dog"', "dog good", False),
        ("#news", "the #News", True),
        ("#news", "the news", False),
        ("news", "the #news", True),
        ("(cat OR dog) lang:en", "dog", True),
        ("-(cat OR dog) bird", "bird", True),
        ("from:ann bird", "bird", True),
        ("from:8 bird", "bird", False),
        ("bird has:links", "bird https://t.co/x", True),
        ("bird has:mentions -has:hashtags", "bird @x", True),
        ("bird -is:retweet", "bird", True),
        ("bird is:reply", "bird", False),
        ("lang:de bird", "bird", False),
    ],
)
def test_rules_are_evaluated(rule: str, text: str, expected: bool) -> None:
    assert parse(rule)(subject(text)) is expected


@pytest.mark.parametrize(
    "rule", ["", "()", "(cat", "cat)", "cat OR", "has:feathers", "sample:0", "context:1.2", "-", "!!"]
)
def test_rules_that_cannot_be_read_are_refused(rule: str) -> None:
    with pytest.raises(RuleSyntaxError):
        parse(rule)


def test_a_search_knows_no_sample() -> None:
    parse("cat sample:10")
    with pytest.raises(RuleSyntaxError):
        parse("cat sample:10", in_search=True)


@given(st.text(max_size=60))
def test_no_rule_breaks_the_parser(rule: str) -> None:
    try:
        parse(rule)(subject("some text"))
    except RuleSyntaxError:
        return


def test_a_sample_takes_its_share() -> None:
    rule = parse("sample:20")
    taken = sum(rule(Subject({"text": "x"}, number)) for number in range(10_000))
    assert 1_500 < taken < 2_500


def test_a_window_opens_with_its_first_call() -> None:
    now = 1_000.0
    window = Window(2, 900.0, lambda: now)
    assert [window.take() for _ in range(3)] == [True, True, False]
    assert window.headers() == {
        "x-rate-limit-limit": "2",
        "x-rate-limit-remaining": "0",
        "x-rate-limit-reset": "1900",
    }
    now = 1_900.0
    assert window.take()


def test_a_ledger_of_a_million_posts_is_small() -> None:
    ledger = Ledger(900.0)
    for position in range(0, 1_000_000, 7):
        ledger.mark(position, STREAMED)
    ledger.mark(999_999, FOUND | GONE)
    ledger.unmark(999_999, FOUND)
    assert len(ledger._marks) == 1_000_000
    assert (ledger.has(7, STREAMED), ledger.has(8, STREAMED), ledger.has(999_999, FOUND)) == (True, False, False)
    ledger.forget_before(999_990)
    assert list(ledger.positions(GONE)) == [999_999]
    assert not ledger.has(7, STREAMED)


def test_a_ledger_knows_the_worst_window() -> None:
    ledger = Ledger(10.0)
    for moment in (0, 1, 2, 30, 31):
        ledger.note_attempt(moment)
    assert (ledger.attempts, ledger.most_attempts) == (5, 3)


@given(st.text(max_size=50))
def test_cut_characters_make_the_same_line(text: str) -> None:
    line = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
    assert b"".join(_cut_in_characters(line)) == line


def test_an_author_is_known_without_the_draft() -> None:
    posts = Generator(3)
    assert [posts.draft(index).author for index in range(50)] == [posts.author(index) for index in range(50)]
