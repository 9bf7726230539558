"""Small decisions of the ingestion, each a pure function."""

from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.api import plan_rules, search_queries, search_shortcoming
from ingest.connection import LineSplitter, refusal
from ingest.ledger import overlapping
from ingest.options import IngestOptions, RuleOption, StreamOptions, is_loopback, load_options, suited_to
from ingest.pipeline import Pipeline, source_name
from ingest.predict import Postponed, Refused, client_for, failure_of, outcomes_of
from overtone.db.gaps import Gap
from overtone.errors import (
    ConfigurationError,
    InvalidInputError,
    OverloadedError,
    StreamError,
    StreamFatalError,
    StreamThrottledError,
    UnauthorizedError,
    UnavailableError,
)
from overtone.schema import Prediction
from overtone.settings import load_settings

CONFIGS = Path(__file__).parents[2] / "configs" / "ingest"


def rule(tag: str, value: str) -> RuleOption:
    return RuleOption(tag=tag, value=value)


# Lines


@given(st.lists(st.binary(max_size=20)), st.lists(st.integers(0, 30)))
def test_lines_survive_any_cut(lines: list[bytes], cuts: list[int]) -> None:
    lines = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    sent = b"".join(line + b"\r\n" for line in lines)
    splitter, got = LineSplitter(1_000), []
    for cut in cuts:
        got += splitter.feed(sent[:cut])
        sent = sent[cut:]
    got += splitter.feed(sent)
    assert (got, splitter.cut) == (lines, 0)


def test_a_line_that_is_too_long_costs_only_itself() -> None:
    splitter = LineSplitter(10)
    got = [line for chunk in (b"one\r\n", b"x" * 8, b"x" * 8, b"x\r\ntwo\r\n") for line in splitter.feed(chunk)]
    assert (got, splitter.cut) == ([b"one", b"x" * 10, b"two"], 1)


# Refusals of the stream


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, {"title": "Unauthorized"}, StreamFatalError, "bearer token"),
        (403, {"detail": "not enrolled"}, StreamFatalError, "not enrolled"),
        (429, {"title": "UsageCapExceeded", "detail": "Monthly"}, StreamFatalError, "spend cap"),
        (429, {"connection_issue": "TooManyConnections"}, StreamThrottledError, ""),
        (429, {"errors": [{"code": 88, "message": "Rate limit exceeded"}]}, StreamThrottledError, "Rate limit"),
        (503, {}, StreamError, "503"),
    ],
)
def test_what_an_answer_means(status: int, body: dict[str, object], kind: type[StreamError], words: str) -> None:
    error = refusal(status, {}, orjson.dumps(body))
    assert type(error) is kind
    assert words in error.message


@given(st.integers(400, 599), st.binary())
def test_any_refusal_is_understood(status: int, body: bytes) -> None:
    assert isinstance(refusal(status, {"x-rate-limit-reset": "x"}, body), StreamError)


# Rules


def test_rules_are_brought_in_line_by_tag() -> None:
    held = [
        {"id": "1", "tag": "same", "value": "cat"},
        {"id": "2", "tag": "changed", "value": "old"},
        {"id": "3", "tag": "leftover", "value": "fish"},
        {"id": "4", "value": "cow"},
    ]
    add, delete, unknown = plan_rules([rule("same", "cat"), rule("changed", "new"), rule("new", "cow")], held)
    assert ([item.tag for item in add], delete, unknown) == (["changed", "new"], ["2", "4"], ["3"])


def test_short_rules_share_a_search() -> None:
    assert search_queries([rule("a", "cat")]) == [("cat", "a")]
    assert search_queries([rule("a", "cat"), rule("b", "dog")]) == [("(cat) OR (dog)", None)]
    assert search_queries([rule("a", "x" * 505), rule("b", "dog")]) == [("x" * 505, "a"), ("dog", "b")]
    assert search_queries([rule("a", "cat sample:10")]) == []


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (["cat -is:retweet", "(a OR b) -is:retweet lang:en"], None),
        (["cat -is:retweet", "dog"], "retweets"),
        (["cat -is:retweet", "dog -is:retweet sample:10"], "operators"),
    ],
)
def test_what_a_search_cannot_find_is_known(values: list[str], why: str | None) -> None:
    said = search_shortcoming([rule(str(number), value) for number, value in enumerate(values)])
    assert said is None if why is None else why in (said or "")


# Gaps


def gap(gap_id: int, after: int | None, before: int) -> Gap:
    now = datetime.now(UTC)
    return Gap(gap_id, "s", "x", now, now, after, before, "closed", 0)


def test_gaps_that_touch_are_repaired_together() -> None:
    groups = overlapping([gap(3, 100, 120), gap(1, 10, 30), gap(2, 20, 40), gap(4, 10, 12), gap(5, 120, 121)])
    assert [sorted(item.gap_id for item in group) for group in groups] == [[1, 2, 4], [3, 5]]


# Options


def test_the_shipped_values_are_the_defaults() -> None:
    assert load_options([CONFIGS / "default.yaml", CONFIGS / "rules.yaml"]) == IngestOptions()


def test_a_later_file_wins_value_by_value(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("write: {batch_rows: 7, flush_s: 1}\n")
    second.write_text("write: {flush_s: 2}\n")
    options = load_options([first, second])
    assert (options.write.batch_rows, options.write.flush_s) == (7, 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rate: 5\n", "rate"),
        ("write: {flush_s: -1}\n", "write.flush_s"),
        ("rules: []\n", "rules"),
        ("stream: {endpoint: firehose}\n", "from 1 to 20"),
        ("stream: {endpoint: sample10, partition: 3}\n", "from 1 to 2"),
        ("stream: {partition: 1}\n", "sample10 and firehose"),
        ("stream: {endpoint: firehose, partition: 1}\n", "enterprise"),
        ("rules: [{tag: a, value: x}, {tag: a, value: y}]\n", "same tag"),
        ("[1]\n", "by name"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=named):
        load_options([path])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8300", True),
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        ("https://api.x.com", False),
    ],
)
def test_the_simulator_is_known_by_its_address(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected
    assert (source_name(url) == "simulator") is expected
    assert (suited_to(url, None).repair.first_start_back_s > 0) is expected


def test_a_partition_is_a_stream_of_its_own() -> None:
    names = [
        source_name(url, StreamOptions(endpoint="firehose", partition=number))
        for url in ("https://api.x.com", "http://localhost:1")
        for number in (1, 2)
    ]
    assert names == ["firehose_1", "firehose_2", "simulator_firehose_1", "simulator_firehose_2"]
    options = StreamOptions(endpoint="firehose", partition=7)
    assert (options.path, options.parameters) == ("/2/tweets/firehose/stream", {"partition": "7"})
    assert (StreamOptions().path, StreamOptions().parameters) == ("/2/tweets/search/stream", {})


def test_only_fields_that_are_wanted_are_asked_for() -> None:
    options = IngestOptions(tweet_fields=("lang",), user_fields=("username",), expansions=("author_id",))
    assert options.fields == {"tweet_fields": ["lang"], "user_fields": ["username"], "expansions": ["author_id"]}


@pytest.mark.parametrize("missing", ["DATABASE_URL", "TWITTER_BEARER_TOKEN"])
def test_a_missing_setting_is_named(missing: str) -> None:
    given_ = {"DATABASE_URL": "postgresql:///x", "TWITTER_BEARER_TOKEN": "t"}
    settings = load_settings(**{name.lower(): None if name == missing else value for name, value in given_.items()})
    with pytest.raises(ConfigurationError, match=missing):
        Pipeline(settings, IngestOptions())


# The API as a client


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, UnauthorizedError),
        (403, UnauthorizedError),
        (413, InvalidInputError),
        (422, InvalidInputError),
        (429, OverloadedError),
        (500, UnavailableError),
        (503, UnavailableError),
        (302, UnavailableError),
    ],
)
def test_what_the_api_answers(status: int, kind: type[Exception]) -> None:
    error = failure_of(status, "7", b"nonsense")
    assert isinstance(error, kind)
    if status in (429, 503):
        assert error.details["retry_after_s"] == 7


def test_outcomes_by_text() -> None:
    body = orjson.dumps(
        {
            "model_version": "m-1",
            "predictions": [
                {"label": "positive", "confidence": 0.9, "scores": {"positive": 0.9}},
                {"error": {"code": "overloaded"}},
                {"error": {"code": "invalid_input"}},
            ],
        }
    )
    assert outcomes_of(body, 3) == [
        Prediction("positive", 0.9, {"positive": 0.9}, "m-1"),
        Postponed("overloaded"),
        Refused("invalid_input"),
    ]


@given(st.binary() | st.sampled_from([b"{}", b'{"predictions": [{}], "model_version": 1}', b"[]", b"null"]))
def test_an_answer_that_is_not_ours_means_not_now(body: bytes) -> None:
    with pytest.raises(UnavailableError):
        outcomes_of(body, 3)


def test_the_key_comes_from_the_setting_or_the_file(tmp_path: Path) -> None:
    assert load_settings(overtone_api_key="a", overtone_home=tmp_path).read_api_key() == "a"
    settings = load_settings(overtone_api_key=None, overtone_home=tmp_path)
    with pytest.raises(UnauthorizedError, match="api_key"):
        settings.read_api_key()
    (tmp_path / "api_key").write_text("b\n")
    assert settings.read_api_key() == "b"


async def test_an_api_on_every_address_is_reached_on_loopback() -> None:
    client = client_for(load_settings(api_host="0.0.0.0", api_port=8398, overtone_api_key="a"), 1.0)
    async with client:
        with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:8398"):
            await client.predict(["x"])
