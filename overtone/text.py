"""Text normalisation, the one function that training, serving and ingestion share.

A bundle records the `TEXT_VERSION` it was trained under and refuses to load under another: a model that
sees differently prepared text than it learned from is wrong without any error to show for it.
"""

import html
import re
import unicodedata

import emoji

TEXT_VERSION = 1
"""Raise this with any change to what `normalise` returns, and train the bundles again."""

_LINK = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MENTION = re.compile(r"(?<![\w@])@\w{1,50}")
_HASHTAG = re.compile(r"#(\w{2,100})")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=[0-9])|(?<=[A-Z])(?=[A-Z][a-z])")
_ELONGATION = re.compile(r"([A-Za-z!?.])\1{2,}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u200b\u2060\ufeff]")
_SPACE = re.compile(r"\s+")
_MAYBE_EMOJI = re.compile(r"[\u00a9\u00ae\u203c-\U0010ffff]")
"""A character that every emoji has at least one of; looking for it is far cheaper than looking for emoji."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def normalise(text: str) -> str:
    """Return `text` as the model reads it.

    HTML entities are resolved; links become `http`, mentions `@user` (the TweetEval convention); hashtags in
    camel case are split into their words; an emoji becomes its CLDR short name in words; three or more of one
    letter or mark become two; white space is folded. Case and accents are left to the bundle's tokenizer.
    """
    if "&" in text:
        text = html.unescape(text)
    text = _UNPRINTABLE.sub(" ", text)
    if not text.isascii():
        text = _words_for_emoji(unicodedata.normalize("NFKC", text))
    if "." in text:
        text = _LINK.sub("http", text)
    if "@" in text:
        text = _MENTION.sub("@user", text)
    if "#" in text:
        text = _HASHTAG.sub(_split_hashtag, text)
    text = _ELONGATION.sub(r"\1\1", text)
    return _SPACE.sub(" ", text).strip()


def depends_on_neighbours(word: str) -> bool:
    """Whether `normalise` may treat `word` differently in different texts; never for words without a link."""
    return "://" in word and "." not in word


def storable(text: str) -> str:
    """Return `text` with NUL and lone surrogates, which PostgreSQL refuses, replaced by U+FFFD."""
    if has_lone_surrogate(text):
        text = _SURROGATE.sub("\ufffd", text)
    return text.replace("\x00", "\ufffd")


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` holds half of a surrogate pair, which no UTF-8 encoder accepts."""
    try:
        text.encode()  # several times as fast as a search
    except UnicodeEncodeError:
        return True
    return False


def _split_hashtag(match: re.Match[str]) -> str:
    return "#" + _CAMEL.sub(" ", match[1])


def _words_for_emoji(text: str) -> str:
    if _MAYBE_EMOJI.search(text) is None or emoji.emoji_count(text) == 0:
        return text
    return emoji.replace_emoji(text, replace=_emoji_words)


def _emoji_words(found: str, data: dict[str, str]) -> str:
    name = data["en"].strip(":").replace("_", " ")
    return f" {name} "
