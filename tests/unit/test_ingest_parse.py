"""Lines of the stream, good and bad."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.parse import Bad, KeepAlive, StreamProblem, messages_of_search, parse_line, post_of
from overtone.schema import Post, snowflake_to_datetime

POST_ID = 1_990_000_000_000_000_000
FIELDS = ("id", "text", "author_id", "created_at", "lang", "note_tweet", "note_post")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
stream_like = st.fixed_dictionaries(
    {},
    optional={
        "data": st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(
                ("id", "text", "author_id", "created_at", "lang", "note_tweet", "note_post"), json_values
            ),
        )
        | json_values,
        "matching_rules": json_values,
        "includes": json_values,
        "errors": json_values,
    },
)


def line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def data(**fields: Any) -> dict[str, Any]:
    return {"id": str(POST_ID), "text": "so good", **fields}


@given(st.binary())
def test_any_bytes_are_answered(raw: bytes) -> None:
    assert isinstance(parse_line(raw), Post | KeepAlive | StreamProblem | Bad)


@given(stream_like)
def test_any_message_is_answered(message: dict[str, Any]) -> None:
    assert isinstance(parse_line(json.dumps(message).encode()), Post | StreamProblem | Bad)


def test_a_whole_post() -> None:
    parsed = parse_line(
        line(
            data=data(author_id="42", created_at="2026-01-02T03:04:05.678Z", lang="en"),
            matching_rules=[{"id": "1", "tag": "brand"}, {"id": "2"}, {"id": "3", "tag": "brand"}],
        )
    )
    assert isinstance(parsed, Post)
    assert (parsed.post_id, parsed.author_id, parsed.text, parsed.lang) == (POST_ID, 42, "so good", "en")
    assert parsed.created_at == datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    assert parsed.rule_tags == ("brand",)


def test_what_the_api_leaves_out_is_made_up_for() -> None:
    parsed = parse_line(line(data=data(), something_new={"a": 1}))
    assert isinstance(parsed, Post)
    assert parsed.created_at == snowflake_to_datetime(POST_ID)
    assert (parsed.author_id, parsed.rule_tags, parsed.lang) == (0, (), None)


@pytest.mark.parametrize("name", ["note_tweet", "note_post"])
def test_a_long_post_is_read_whole(name: str) -> None:
    parsed = parse_line(line(data=data(text="so…", **{name: {"text": "so very long"}})))
    assert isinstance(parsed, Post)
    assert parsed.text == "so very long"


def test_characters_postgres_refuses_are_replaced() -> None:
    parsed = parse_line(b'{"data": {"id": "7", "text": "a\\u0000b\\ud83dc \\ud83d\\ude00"}}')
    assert isinstance(parsed, Post)
    assert parsed.text == "a\ufffdb\ufffdc \U0001f600"


def test_a_partial_error_beside_a_post_is_no_problem() -> None:
    assert isinstance(parse_line(line(data=data(), errors=[{"title": "Not Found Error"}])), Post)


def test_an_edit_is_a_post_of_its_own_and_keeps_its_history() -> None:
    parsed = parse_line(line(data=data(edit_history_tweet_ids=["5", str(POST_ID)])))
    assert isinstance(parsed, Post)
    assert parsed.post_id == POST_ID
    assert parsed.payload["data"]["edit_history_tweet_ids"][0] == "5"


def test_an_error_only_line_is_a_problem() -> None:
    problem = {"title": "operational-disconnect", "detail": "gone", "type": "https://api.x.com/2/problems/op-dis"}
    assert parse_line(line(errors=[problem])) == StreamProblem("operational-disconnect", "gone", "op-dis")
    assert parse_line(line(**problem)) == StreamProblem("operational-disconnect", "gone", "op-dis")


@pytest.mark.parametrize("raw", [b"", b"\r\n", b"  \n"])
def test_an_empty_line_is_a_keep_alive(raw: bytes) -> None:
    assert parse_line(raw) == KeepAlive()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{oops", "not_json"),
        (b"\xff\xfe", "not_json"),
        (b'{"data": {"id": "\\ud800", "x": ' + b"[" * 100_000, "not_json"),
        (b"[1]", "not_an_object"),
        (b"{}", "unknown_message"),
        (b'{"data": {"text": "x"}}', "no_post_id"),
        (b'{"data": {"id": "-5", "text": "x"}}', "no_post_id"),
        (b'{"data": {"id": "99999999999999999999", "text": "x"}}', "no_post_id"),
        (b'{"data": {"id": true, "text": "x"}}', "no_post_id"),
        (b'{"data": {"id": "5"}}', "no_text"),
    ],
)
def test_what_holds_no_post_says_why(raw: bytes, reason: str) -> None:
    parsed = parse_line(raw)
    assert isinstance(parsed, Bad)
    assert (parsed.raw, parsed.reason) == (raw, reason)


def test_search_answers_become_stream_messages() -> None:
    answer = {
        "data": [data(author_id="1"), data(author_id="2")],
        "includes": {"users": [{"id": "2", "name": "Two"}]},
        "meta": {},
    }
    first, second = messages_of_search(answer)
    assert "includes" not in first
    assert second["includes"] == {"users": [{"id": "2", "name": "Two"}]}
    assert isinstance(post_of(second), Post)
    assert messages_of_search({"meta": {"result_count": 0}}) == []


@given(
    st.fixed_dictionaries({}, optional={"data": st.lists(json_values) | json_values, "includes": json_values})
    | st.fixed_dictionaries({"data": st.lists(stream_like), "includes": st.fixed_dictionaries({"users": json_values})})
)
def test_any_search_answer_is_answered(answer: dict[str, Any]) -> None:
    assert all(isinstance(post_of(message), Post | str) for message in messages_of_search(answer))
