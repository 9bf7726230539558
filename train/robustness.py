"""Changes to a text that leave its meaning, to see whether they leave a model's answer too. Pure and seeded."""

import random
import re
from collections.abc import Callable, Mapping, Sequence

_MENTION = re.compile(r"(?<![\w@])@\w{1,50}")
_WORD = re.compile(r"(?<!\S)[A-Za-z]{4,}(?=[,.!?;:]*(?:\s|$))")
_TYPO_SHARE = 0.1
_NAMES = ("ann", "Real_Sam", "news4you", "x", "TheJonesFamily")


def perturbations(texts: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """Each of `texts` under every change, by the name of the change; the same seed gives the same texts.

    `typos` swaps, doubles or drops a letter in one of ten words of four letters or more; `lower_case` and `upper_case`
    are what they say; `mentions_renamed` and `mentions_removed` change the mentions there are; `mention_added` puts one
    in front.
    """
    changed = {}
    for name, change in _CHANGES.items():
        rng = random.Random(f"{seed}/{name}")
        changed[name] = [change(text, rng).strip() or text for text in texts]
    return changed


def _typos(text: str, rng: random.Random) -> str:
    words = list(_WORD.finditer(text))
    chosen = [word for word in words if rng.random() < _TYPO_SHARE]
    if words and not chosen:
        chosen = [rng.choice(words)]
    for word in reversed(chosen):
        text = text[: word.start()] + _misspell(word[0], rng) + text[word.end() :]
    return text


def _misspell(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 1)
    before, here, after = word[:at], word[at], word[at + 1 :]
    return rng.choice((before + after[0] + here + after[1:], before + here + here + after, before + after))


def _upper(text: str, _rng: random.Random) -> str:
    # A mention or link in capitals would be the same mention or another link.
    return " ".join(word if word.startswith("@") or "://" in word else word.upper() for word in text.split(" "))


_CHANGES: Mapping[str, Callable[[str, random.Random], str]] = {
    "typos": _typos,
    "lower_case": lambda text, _rng: text.lower(),
    "upper_case": _upper,
    "mentions_renamed": lambda text, rng: _MENTION.sub(lambda _: f"@{rng.choice(_NAMES)}", text),
    "mentions_removed": lambda text, _rng: _MENTION.sub("", text),
    "mention_added": lambda text, rng: f"@{rng.choice(_NAMES)} {text}",
}
