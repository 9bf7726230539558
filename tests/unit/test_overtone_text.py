"""Normalisation: golden cases, and what must hold for any text at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.text import has_lone_surrogate, normalise, storable

ANY_TEXT = st.text(st.characters(codec=None))
"""Every character Python strings can hold, lone surrogates included."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I love this", "I love this"),
        ("  a\t b\n\nc  ", "a b c"),
        ("see https://t.co/AbC123 now", "see http now"),
        ("WWW.example.com", "http"),
        ("@Some_One hi", "@user hi"),
        (".@a and @b", ".@user and @user"),
        ("mail me@example.com", "mail me@example.com"),
        ("#HappyDays", "#Happy Days"),
        ("#GOPDebate2016", "#GOP Debate 2016"),
        ("#love", "#love"),
        ("soooooo goooood!!!!!", "soo good!!"),
        ("1000000 is left alone", "1000000 is left alone"),
        ("Tom &amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("nice 😀", "nice grinning face"),
        ("a\u200bb\ufeff", "a b"),
        ("nul\x00byte", "nul byte"),
        ("ﬁne", "fine"),
        ("", ""),
        ("   ", ""),
    ],
)
def test_golden_cases(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(ANY_TEXT)
def test_any_text_becomes_one_trimmed_line(text: str) -> None:
    result = normalise(text)
    assert len(result.splitlines()) <= 1
    assert result == result.strip()
    assert "  " not in result


@given(ANY_TEXT)
def test_the_length_stays_bounded(text: str) -> None:
    # The longest growth is one character that NFKC or an emoji name spells out.
    assert len(normalise(text)) <= 64 * len(text)


@given(st.lists(st.from_regex(r"[b-y]{1,12}", fullmatch=True)).map(" ".join))
def test_a_second_pass_changes_nothing_in_plain_words(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(ANY_TEXT)
def test_storable_text_encodes_and_holds_no_nul(text: str) -> None:
    result = storable(text)
    result.encode("utf-8")
    assert "\x00" not in result
    assert len(result) == len(text)


@given(ANY_TEXT)
def test_a_lone_surrogate_is_found_exactly_when_utf8_refuses(text: str) -> None:
    try:
        text.encode("utf-8")
        refused = False
    except UnicodeEncodeError:
        refused = True
    assert has_lone_surrogate(text) is refused
