"""What people post, made storable."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.db.payload import is_int64, json_text, raw_of
from overtone.schema import Post

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


def refused(character: str) -> bool:
    return character == "\x00" or "\ud800" <= character <= "\udfff"


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


@given(ANY_JSON)
def test_json_text_never_holds_what_postgres_refuses(value: Any) -> None:
    text = json_text(value)
    text.encode("utf-8")
    assert not any(refused(character) for found in strings(json.loads(text)) for character in found)


@pytest.mark.parametrize("value", [{}, {"a": [1, 2.5, None, True]}, {"text": "naïve \\u0000 😀"}, 2**70])
def test_harmless_json_is_kept(value: Any) -> None:
    assert json.loads(json_text(value)) == value


def test_numbers_that_json_lacks_become_null() -> None:
    assert json.loads(json_text({"x": float("nan"), "y": [float("inf"), "\x00"]})) == {"x": None, "y": [None, "\ufffd"]}


def test_bottomless_payload_is_refused() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="nested too deeply"):
        json_text(value)
    raw = raw_of(Post(1, 2, "text", datetime(2026, 1, 1, tzinfo=UTC), payload={"deep": value}))
    assert json.loads(raw)["text"] == "text"


@given(ANY_TEXT)
def test_raw_bytes_keep_the_text_exactly(text: str) -> None:
    raw = raw_of(Post(1, 2, text, datetime(2026, 1, 1, tzinfo=UTC)))
    assert json.loads(raw)["text"] == text


def test_bounds_of_bigint() -> None:
    assert is_int64(2**63 - 1)
    assert is_int64(-(2**63))
    assert not is_int64(2**63)
