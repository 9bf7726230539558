"""Tokenisation word by word, with the words remembered.

`tokenizers` takes about 45 us for a post and normalising it as long again, most of it for words that were seen a
thousand times before. Where a tokenizer splits at white space first, as those of BERT's family do, the ids of a word do
not depend on its neighbours: they can be looked up, which takes a twentieth of the time. What the words give is exactly
what the whole text gives; a tokenizer for which that cannot be said is not used in this way.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

_MAX_WORDS = 131_072
"""Words remembered at most, about 30 MB. Posts use new words without end: when it is full, the older half goes."""
_MAX_WORD_CHARS = 40


class WordEncoder:
    """Texts to token ids through a store of words. Threads may share one."""

    def __init__(
        self,
        normalise: Callable[[str], str],
        encode: Callable[[str], Sequence[int]],
        frame: tuple[list[int], list[int]],
        depends_on_neighbours: Callable[[str], bool],
    ) -> None:
        """`encode` gives the ids of a normalised word, without those that frame a row, which are in `frame`.

        A text with a word that `depends_on_neighbours` is left to others.
        """
        self._normalise = normalise
        self._encode = encode
        self._before, self._after = frame
        self._depends_on_neighbours = depends_on_neighbours
        self._known: dict[str, tuple[int, ...]] = {}
        self._placeholders: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str, most: int) -> list[int] | None:
        """The ids of `text`, at most `most`, those of the frame included; None where words alone cannot tell."""
        found = self._before.copy()
        known = self._known
        for word in text.split():
            ids = known.get(word)
            if ids is None:
                if self._depends_on_neighbours(word):
                    return None
                ids = self._learn(word)
            found += ids
        room = most - len(self._after)
        if len(found) > room:
            del found[room:]
        found += self._after
        return found

    def _learn(self, word: str) -> tuple[int, ...]:
        normal = self._normalise(word)
        if "@" not in word and "://" not in word:
            ids = tuple(self._encode(normal))
            _remember(self._known, word, ids)
            return ids
        # Every mention and every link is a word of its own, but they all normalise to the same few.
        return self._placeholders.get(normal) or _remember(self._placeholders, normal, tuple(self._encode(normal)))


def _remember(store: dict[str, tuple[int, ...]], word: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    if len(word) <= _MAX_WORD_CHARS:
        if len(store) >= _MAX_WORDS:
            for old in list(store)[: _MAX_WORDS // 2]:
                store.pop(old, None)
        store[word] = ids
    return ids


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The ids before and after every row of `tokenizer`, or None if its words depend on their neighbours.

    They do not where the text is split at white space, each character is normalised by itself, no special token holds
    white space or takes any with it, and the ids of a row are those of its words between the same few ids.
    """
    parts = json.loads(tokenizer.to_str())
    splits, normalises, frames = parts["pre_tokenizer"], parts["normalizer"], parts["post_processor"]
    if (splits or {}).get("type") != "BertPreTokenizer" or (normalises or {}).get("type") != "BertNormalizer":
        return None
    if any(_reaches_out(token) for token in parts["added_tokens"]):
        return None
    if (frames or {}).get("type") != "TemplateProcessing":
        return None
    return _frame(frames)


def _reaches_out(token: dict[str, Any]) -> bool:
    return bool(token["lstrip"] or token["rstrip"] or token["single_word"] or len(token["content"].split()) != 1)


def _frame(template: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    sides: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for part in template["single"]:
        if "Sequence" in part:
            texts += 1
        else:
            sides[texts > 0].extend(template["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    return sides if texts == 1 else None
