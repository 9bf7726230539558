"""What becomes of texts that are longer than the model reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.errors import EngineError, InvalidInputError
from serve.longtext import Encoded, encode

SIX_WORDS = "love great fine okay hate worst"
EIGHT_WORDS = f"{SIX_WORDS} love great"


@pytest.fixture
def encoder(tiny_bundle: Bundle) -> TextEncoder:
    return TextEncoder(tiny_bundle)


def test_windows_hold_every_token_once(encoder: TextEncoder) -> None:
    (short,), (first, second) = encoder.windows([SIX_WORDS, EIGHT_WORDS])

    assert [short, first] == encoder.encode([SIX_WORDS, EIGHT_WORDS])
    assert second == [1, 4, 5, 2]
    assert (encoder.count(SIX_WORDS), encoder.count(EIGHT_WORDS)) == (8, 10)


@pytest.fixture(scope="module")
def default_encoder() -> TextEncoder:
    return TextEncoder(load_bundle())


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["love", "#BadDay", "don't!!!", "\U0001f600", "@a", "https://a.b/c", "ü"]), max_size=300
    )
)
def test_windows_of_the_default_bundle_add_up(default_encoder: TextEncoder, words: list[str]) -> None:
    encoder = default_encoder
    (rows,) = encoder.windows([" ".join(words)])

    assert all(len(ids) == encoder.max_length for ids in rows[:-1])
    assert rows[0] == encoder.encode([" ".join(words)])[0]
    assert {ids[0] for ids in rows} == {rows[0][0]}
    assert {ids[-1] for ids in rows} == {rows[0][-1]}


def test_truncating_gives_one_row_a_text_and_no_work_after(encoder: TextEncoder) -> None:
    encoded = encode(encoder, [EIGHT_WORDS, "love"])
    results: list[list[float] | Exception] = [[0.1, 0.9], [0.2, 0.8]]

    assert encoded.rows == encoder.encode([EIGHT_WORDS, "love"])
    assert encoded.merge(results) is results


def test_rejecting_names_tokens_and_limit_and_spares_the_engine(encoder: TextEncoder) -> None:
    encoded = encode(encoder, ["love", EIGHT_WORDS, SIX_WORDS], "reject")
    love, refused, six = encoded.merge([[0.1, 0.9], [0.2, 0.8]])

    assert encoded.rows == encoder.encode(["love", SIX_WORDS])
    assert (love, six) == ([0.1, 0.9], [0.2, 0.8])
    assert isinstance(refused, InvalidInputError)
    assert (refused.details["size"], refused.details["limit"]) == (10, 8)
    assert "love" not in refused.message


def test_windows_are_averaged_by_their_tokens(encoder: TextEncoder) -> None:
    encoded = encode(encoder, [EIGHT_WORDS, "love"], "window")

    assert [len(ids) for ids in encoded.rows] == [8, 4, 3]
    assert encoded.merge([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]) == [[0.25, 0.75], [0.5, 0.5]]


def test_a_window_that_fails_fails_its_text_alone(encoder: TextEncoder) -> None:
    failure = EngineError("The engine failed on this text.")
    encoded = encode(encoder, [EIGHT_WORDS, "love"], "window")

    assert encoded.merge([[0.0, 1.0], failure, [0.5, 0.5]]) == [failure, [0.5, 0.5]]


@pytest.mark.parametrize("policy", ["truncate", "reject", "window"])
def test_slices_join_to_the_whole(encoder: TextEncoder, policy: str) -> None:
    texts = ["love", EIGHT_WORDS, "hate", EIGHT_WORDS]
    joined = Encoded([], None if policy == "truncate" else [])
    for start in (0, 2):
        joined.extend(encode(encoder, texts[start : start + 2], policy))  # type: ignore[arg-type]
    whole = encode(encoder, texts, policy)  # type: ignore[arg-type]
    results: list[list[float] | Exception] = [[float(number), 0.0] for number in range(len(whole.rows))]

    assert joined.rows == whole.rows
    assert [str(row) for row in joined.merge(list(results))] == [str(row) for row in whole.merge(list(results))]
