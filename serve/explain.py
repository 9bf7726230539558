"""Why a text got its label: what each of its tokens adds, by leaving it out (occlusion).

The text and its variants are classified together, by one bundle. Pure but for the tokenizer that is handed in.
"""

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from overtone.bundle import TextEncoder
from serve.longtext import Scores

MAX_TOKENS = 256
MAX_TEXTS = 16
"""Texts of one request that are explained."""

_DIGITS = 6
_TOKEN = re.compile(r"(?:https?://|www\.)\S+|[@#]\w+|&#?\w{1,32};|\w+(?:['’-]\w+)*|[^\w\s]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the text as it was sent: a word, link, mention, hashtag or run of signs."""

    text: str
    start: int
    """In characters (Unicode code points) of the text."""
    end: int


@dataclass(frozen=True, slots=True)
class Occlusion:
    """A text, and all that has to be classified to explain it."""

    tokens: tuple[Token, ...]
    variants: tuple[str, ...]
    """The text, the text as far as the model reads it, and the latter without each token in turn."""

    def explanation(self, rows: list[Scores | Exception]) -> list[dict[str, Any]]:
        """What each token adds to the probability of the predicted label, of the results of `variants`.

        Raises:
            Exception: what befell one of the rows.
        """
        scores: list[Scores] = []
        for row in rows:
            if isinstance(row, Exception):
                raise row
            scores.append(row)
        whole, read, *without = scores
        best = whole.index(max(whole))
        return [
            {
                "token": token.text,
                "start": token.start,
                "end": token.end,
                "contribution": round(read[best] - row[best], _DIGITS),
            }
            for token, row in zip(self.tokens, without, strict=True)
        ]


def occlusion(encoder: TextEncoder, text: str) -> Occlusion:
    """What to classify for `text`. At most `MAX_TOKENS` tokens, and no more than the model reads, are left out."""
    found = islice(_TOKEN.finditer(text), min(MAX_TOKENS, encoder.max_length))
    tokens = [Token(match[0], match.start(), match.end()) for match in found]
    kept = _that_fit(encoder, text, tokens)
    # Without the rest: otherwise a token that is left out would make room for one that was never read.
    read = text if len(kept) == len(tokens) and encoder.count(text) <= encoder.max_length else text[: kept[-1].end]
    without = (f"{read[: token.start]} {read[token.end :]}" for token in kept)
    return Occlusion(tuple(kept), (text, read, *without))


def _that_fit(encoder: TextEncoder, text: str, tokens: list[Token]) -> list[Token]:
    """The first of `tokens` that the model reads to the end; at least one if there is any."""
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        if encoder.count(text[: tokens[middle - 1].end]) <= encoder.max_length:
            low = middle
        else:
            high = middle - 1
    return tokens[:high]
