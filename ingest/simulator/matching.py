"""Stream rules and search queries, evaluated: the operators that a test or a trial needs, refusing all others.

Words, "phrases", #tags, @names, `lang:`, `from:`, `has:links|hashtags|mentions`, `is:reply|retweet|quote`, `sample:`,
negation by `-`, OR, brackets; what stands side by side must all hold. Pure functions.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

_TOKEN = re.compile(r'\s*(?:(-?\()|(\))|(-?(?:[a-z_]+:)?"[^"]*")|(\S[^\s()]*))')
_WORD = re.compile(r"[#@]?\w+")
_KNOWN = {"has": ("links", "hashtags", "mentions"), "is": ("reply", "retweet", "quote")}
_MAX_DEPTH = 50


@dataclass(frozen=True, slots=True)
class Subject:
    """What rules look at."""

    post: Mapping[str, Any]
    """As the X API shows it, with every field that a rule may ask for."""
    number: int
    """By which a sample is drawn."""


Rule = Callable[[Subject], bool]


class RuleSyntaxError(ValueError):
    """The rule cannot be read; the message says where."""


def parse(value: str, *, in_search: bool = False) -> Rule:
    """What `value` asks of a post. A search knows no `sample:`.

    Raises:
        RuleSyntaxError: it is empty, out of balance, or has an operator that is not known here.
    """
    tokens = [next(part for part in match.groups() if part) for match in _TOKEN.finditer(value)]
    rule = _either(tokens, in_search, 0)
    if tokens:
        raise RuleSyntaxError("there is a closing bracket too many")
    return rule


def words_of(text: str) -> tuple[str, ...]:
    """The words of `text` in lower case; #tags and @names keep their sign."""
    return tuple(word.lower() for word in _WORD.findall(text))


def _either(tokens: list[str], in_search: bool, depth: int) -> Rule:
    if depth > _MAX_DEPTH:
        raise RuleSyntaxError("brackets are nested too deeply")
    ways = [_all(tokens, in_search, depth)]
    while tokens and tokens[0] == "OR":
        tokens.pop(0)
        ways.append(_all(tokens, in_search, depth))
    return ways[0] if len(ways) == 1 else lambda subject: any(way(subject) for way in ways)


def _all(tokens: list[str], in_search: bool, depth: int) -> Rule:
    parts: list[Rule] = []
    while tokens and tokens[0] not in ("OR", ")"):
        parts.append(_one(tokens, in_search, depth))
    if not parts:
        raise RuleSyntaxError("something is missing before or after OR, or between brackets")
    return parts[0] if len(parts) == 1 else lambda subject: all(part(subject) for part in parts)


def _one(tokens: list[str], in_search: bool, depth: int) -> Rule:
    token = tokens.pop(0)
    is_negated, body = (True, token[1:]) if token.startswith("-") and len(token) > 1 else (False, token)
    if body == "(":
        rule = _either(tokens, in_search, depth + 1)
        if not tokens or tokens.pop(0) != ")":
            raise RuleSyntaxError("a bracket is not closed")
    else:
        rule = _operator(body, in_search)
    return (lambda subject: not rule(subject)) if is_negated else rule


def _operator(body: str, in_search: bool) -> Rule:
    name, colon, argument = body.partition(":")
    if body.startswith('"') or not colon or not name.isidentifier():
        wanted = words_of(body)
        if not wanted:
            raise RuleSyntaxError(f"{body!r} holds no word")
        return partial(_has_words, wanted)
    argument = argument.strip('"').lower()
    if name == "lang" and argument:
        return lambda subject: subject.post.get("lang") == argument
    if name == "from" and argument:
        return lambda subject: argument.lstrip("@") in (subject.post["author_id"], subject.post["username"])
    if name == "sample" and not in_search and argument.isdigit() and 1 <= int(argument) <= 100:
        return lambda subject: subject.number * 2_654_435_761 % 2**32 % 100 < int(argument)
    if argument in _KNOWN.get(name, ()):
        return partial(_shows, argument)
    raise RuleSyntaxError(f"{name}: with this value is no operator here")


def _has_words(wanted: tuple[str, ...], subject: Subject) -> bool:
    words = words_of(subject.post["text"])
    bare = tuple(word.lstrip("#@") for word in words)
    size = len(wanted)
    return any(
        words[start : start + size] == wanted or bare[start : start + size] == wanted
        for start in range(len(words) - size + 1)
    )


def _shows(what: str, subject: Subject) -> bool:
    text = subject.post["text"]
    if what == "links":
        return "https://" in text or "http://" in text
    if what in ("hashtags", "mentions"):
        sign = "#" if what == "hashtags" else "@"
        return any(word.startswith(sign) for word in words_of(text))
    kind = {"reply": "replied_to", "retweet": "retweeted", "quote": "quoted"}[what]
    return any(item["type"] == kind for item in subject.post.get("referenced_tweets", ()))
