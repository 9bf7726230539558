"""Kinds of text that a model may be worse at than its mean shows: which rows of a data set are of which kind.

What stands in a text is looked for in the text as it was written, because normalising it turns an emoji into words.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import emoji
import numpy as np
from numpy.typing import NDArray

_NEGATION = re.compile(
    r"\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|cannot|without|hardly|barely|ain['’]?t"
    r"|(?:is|are|was|were|do|does|did|has|have|had|ca|could|wo|would|should|must|need)n['’]?t)\b",
    re.IGNORECASE,
)
_HASHTAG = re.compile(r"#\w")
_MENTION = re.compile(r"(?<![\w@])@\w")
_LINK = re.compile(r"https?://|\bhttp\b|\bwww\.", re.IGNORECASE)
_ALL_CAPS = re.compile(r"(?<![\w#@])[A-Z]{3,}(?![\w])")
_SHORT_WORDS, _LONG_WORDS = 10, 22
_SURE = 0.5
"""Confidence from which a text counts as written in another language; short English texts are often unsure."""


def slices_of(texts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """For each kind of text, which of `texts` are of it; shape [texts] each. Kinds overlap."""
    return {name: np.array([test(text) for text in texts], dtype=bool) for name, test in _TESTS.items()}


def _is_short(text: str) -> bool:
    return len(text.split()) <= _SHORT_WORDS


def _is_long(text: str) -> bool:
    return len(text.split()) >= _LONG_WORDS


def _shouts(text: str) -> bool:
    # One word in capitals is mostly an abbreviation.
    return len(_ALL_CAPS.findall(text)) >= 2


def _is_foreign(text: str) -> bool:
    language, confidence = _identifier().classify(text)
    return bool(language != "en" and confidence >= _SURE)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_TESTS: Mapping[str, Callable[[str], bool]] = {
    "short": _is_short,
    "medium": lambda text: not _is_short(text) and not _is_long(text),
    "long": _is_long,
    "emoji": lambda text: not text.isascii() and emoji.emoji_count(text) > 0,
    "negation": lambda text: _NEGATION.search(text) is not None,
    "hashtag": lambda text: _HASHTAG.search(text) is not None,
    "mention": lambda text: _MENTION.search(text) is not None,
    "link": lambda text: _LINK.search(text) is not None,
    "all_caps": _shouts,
    "question": lambda text: "?" in text,
    "not_english": _is_foreign,
}

SLICES = tuple(_TESTS)
"""Names of the slices, in the order they are shown."""
