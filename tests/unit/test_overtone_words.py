"""Encoding by the word gives what encoding the whole text gives."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from overtone.bundle import DEFAULT_BUNDLE, TextEncoder, load_bundle
from overtone.text import depends_on_neighbours, normalise
from overtone.words import WordEncoder, frame_of

PIECES = (
    "@user_1 #HappyFriday2024 #ALLCaps soooo!!! don't &amp; &lt;b&gt; &#64;me &nbsp; &#10; http://t.co/aB1 "
    "http://localhost https://x www.a.b 🎉 \U0001f469\u200d\U0001f469\u200d\U0001f467 👍🏽 ❤️ ™ ﬁne Ａｂ café ´ e\u0301 "
    "[SEP] [MASK]x [CLS] 1,000.50 $3.39 東京 ΣΑΣ \u0301 a\x00b x\u200by \ufeff \u0085 \u2028 \u180e \ud83d :-) ... "
    "?!?! ﷺ ½ İ ß"
).split(" ")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(load_bundle(None))


def whole(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.windows([text])[0][0]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=20), st.sampled_from(" \t\n\u00a0\u3000"))
def test_words_give_what_the_text_gives(encoder: TextEncoder, pieces: list[str], between: str) -> None:
    text = between.join(pieces)

    assert encoder.encode([text]) == [whole(encoder, text)]


def test_a_long_text_is_cut(encoder: TextEncoder) -> None:
    text = "extraordinarily " * 400

    (row,) = encoder.encode([text])

    assert len(row) == encoder.max_length
    assert row == whole(encoder, text[: len(text)])


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_text_normalises_as_its_words_do(left: str, right: str) -> None:
    words = f"{left} {right}".split()
    if not any(map(depends_on_neighbours, words)):
        assert normalise(f"{left} {right}").split() == " ".join(map(normalise, words)).split()


def test_the_store_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overtone.words._MAX_WORDS", 10)
    asked: list[str] = []

    def encode(word: str) -> list[int]:
        asked.append(word)
        return [len(word)]

    words = WordEncoder(str.lower, encode, ([1], [2]), lambda word: False)
    for number in range(25):
        assert words.ids(f"word{number}", 9) == [1, len(f"word{number}"), 2]
    assert words.ids("word24 word24", 9) == [1, 6, 6, 2]

    assert asked.count("word24") == 1
    assert len(words._known) <= 10


def test_mentions_and_links_share_what_they_become() -> None:
    asked: list[str] = []

    def encode(word: str) -> list[int]:
        asked.append(word)
        return [7]

    words = WordEncoder(normalise, encode, ([], []), depends_on_neighbours)
    assert words.ids("@one @two https://t.co/a https://t.co/b @one", 9) == [7] * 5

    assert asked == ["@user", "http"]


def test_a_tokenizer_whose_words_depend_on_neighbours_is_left_alone(bundle_files: Path) -> None:
    tiny = Tokenizer.from_file(str(bundle_files / "tokenizer.json"))
    bert = Tokenizer.from_file(str(DEFAULT_BUNDLE / "tokenizer.json"))

    assert frame_of(tiny) is None
    assert frame_of(bert) == ([101], [102])
