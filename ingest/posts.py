"""Texts for the simulator: made up from phrases, the same for the same seed, or read from a file.

None of it is a real post: every name, handle and sentence is invented.
"""

import csv
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from overtone.errors import ConfigurationError

Mood = Literal["positive", "negative", "neutral"]

_MOODS: tuple[Mood, ...] = ("positive", "negative", "neutral")
_SHORT_TEXT_CHARS = 280

AUTHORS = 10_000
"""How many authors posts have."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What one simulated post says, before it has an id."""

    text: str
    author: int
    """Number of the author, 0 to 9999."""
    lang: str = "en"
    is_reply: bool = False

    @property
    def is_long(self) -> bool:
        """Whether the X API would cut `text` and send the whole as a note."""
        return len(self.text) > _SHORT_TEXT_CHARS

    @property
    def short_text(self) -> str:
        """The text as the X API puts it into `text`: cut after 280 characters."""
        return self.text if not self.is_long else self.text[: _SHORT_TEXT_CHARS - 1] + "…"


class PostSource(Protocol):
    """Gives the draft of every index from 0 on, the same one each time it is asked."""

    def draft(self, index: int) -> Draft:
        """The draft number `index`."""
        ...

    def author(self, index: int) -> int:
        """The author of the draft number `index`, without making it."""
        ...


class Generator:
    """Believable English posts of mixed mood, length and decoration; equal seeds give equal posts."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._phrases = _phrases()
        self._subjects: list[dict[str, Any]] = list(self._phrases["subjects"].values())

    def draft(self, index: int) -> Draft:
        """The post number `index`."""
        dice = random.Random(f"{self._seed}:{index}")
        mood = dice.choices(_MOODS, weights=(38, 27, 35))[0]
        subject = dice.choice(self._subjects)
        count = 1 + (dice.random() < 0.35) if dice.random() > 0.04 else dice.randint(6, 16)
        sentences = [self._sentence(dice, subject, self._pool(dice, mood, number)) for number in range(count)]
        text = self._decorate(dice, subject, mood, _join(sentences))
        is_reply = dice.random() < 0.12
        if is_reply:
            text = f"{dice.choice(self._phrases['names'])} {text}"
        return Draft(text=text, author=self.author(index), is_reply=is_reply)

    def author(self, index: int) -> int:
        """See `PostSource.author`."""
        return zlib.crc32(b"%d:%d" % (self._seed, index)) % AUTHORS

    def _pool(self, dice: random.Random, mood: Mood, number: int) -> list[str]:
        if number == 0:
            name: str = mood
        else:
            name = "but" if dice.random() < 0.3 else f"follow_{mood}" if dice.random() < 0.6 else mood
        pool: list[str] = self._phrases[name]
        return pool

    def _sentence(self, dice: random.Random, subject: dict[str, Any], pool: list[str]) -> str:
        sentence = dice.choice(pool).format(
            thing=dice.choice(subject["things"]),
            place=dice.choice(subject["places"]),
            when=dice.choice(self._phrases["when"]),
            name=dice.choice(self._phrases["names"]),
            tag=subject["tag"],
            n=dice.randint(2, 12),
        )
        return sentence if dice.random() < 0.4 else sentence[0].upper() + sentence[1:]

    def _decorate(self, dice: random.Random, subject: dict[str, Any], mood: Mood, text: str) -> str:
        if dice.random() < 0.06:
            text = text.upper()
        if text[-1].isalpha() and dice.random() < 0.4:
            text += dice.choice(("!", "!!!", "...", ".") if mood != "neutral" else (".", "..."))
        if dice.random() < 0.35:
            text += " " + "".join(dice.choices(self._phrases[f"emoji_{mood}"], k=dice.randint(1, 3)))
        if dice.random() < 0.3:
            text += f" #{subject['tag']}"
        if dice.random() < 0.15:
            text += f" https://t.co/{dice.getrandbits(50):010x}"
        return text


def _join(sentences: list[str]) -> str:
    ended = [text if text[-1] in ".!?" else f"{text}." for text in sentences[:-1]]
    return " ".join([*ended, sentences[-1]])


class FilePosts:
    """The texts of a file, over and over, in their order."""

    def __init__(self, path: Path) -> None:
        try:
            self._texts = [text for text in _read_texts(path) if text]
        except (OSError, UnicodeError, ValueError, KeyError, csv.Error) as error:
            raise ConfigurationError(f"posts file {path}: cannot be read ({type(error).__name__}: {error})") from error
        if not self._texts:
            raise ConfigurationError(f"posts file {path}: no texts found; it needs a `text` column or field")

    def __len__(self) -> int:
        return len(self._texts)

    def draft(self, index: int) -> Draft:
        """The text number `index`, counting on from the start of the file after its end."""
        text = self._texts[index % len(self._texts)]
        return Draft(text=text, author=self.author(index), is_reply=text.startswith("@"))

    def author(self, index: int) -> int:
        """See `PostSource.author`."""
        return index % AUTHORS


def open_posts(path: Path | None, seed: int) -> PostSource:
    """The posts of the file at `path`, or generated ones.

    Raises:
        ConfigurationError: the file cannot be read or holds no text.
    """
    return Generator(seed) if path is None else FilePosts(path)


def _read_texts(path: Path) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix in {".jsonl", ".ndjson"}:
        return _read_jsonl(path)
    if suffix in {".tsv", ".csv"}:
        return _read_table(path, tabs=suffix == ".tsv")
    raise ConfigurationError(f"posts file {path}: must end in .jsonl, .ndjson, .tsv or .csv")


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield _text_of(json.loads(line))


def _text_of(item: Any) -> str:
    """The text of a JSON line: a bare string, `{"text"}`, or a post in the X API's own form."""
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        raise ValueError("a line must be a string or an object with `text`")
    post = item.get("data", item)
    note = post.get("note_tweet") or post.get("note_post") or {}
    return str(note.get("text") or post["text"])


def _read_table(path: Path, *, tabs: bool) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(lines)
        if "text" not in (rows.fieldnames or ()):
            raise ConfigurationError(f"posts file {path}: the first line must name a column `text`")
        for row in rows:
            yield row["text"] or ""


@cache
def _phrases() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(files("ingest").joinpath("phrases.yaml").read_text(encoding="utf-8"))
    return loaded
