"""Trying rules on posts that are at hand, before X bills what they bring. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingest.options import RuleOption
from ingest.simulator.matching import Rule, RuleSyntaxError, Subject, parse


@dataclass(slots=True)
class Trial:
    """What one rule does to the posts."""

    tag: str
    value: str
    matched: int | None
    """How many posts it matches; None where it has operators that cannot be evaluated here."""
    note: str | None = None
    """Why it could not be evaluated."""


def try_rules(rules: Sequence[RuleOption], posts: Iterable[Subject]) -> list[Trial]:
    """How many of `posts` each of `rules` matches."""
    trials = [(Trial(rule.tag, rule.value, 0), _readable(rule.value)) for rule in rules]
    for trial, rule in trials:
        if isinstance(rule, str):
            trial.matched, trial.note = None, rule
    for post in posts:
        for trial, rule in trials:
            if not isinstance(rule, str) and trial.matched is not None:
                trial.matched += rule(post)
    return [trial for trial, _ in trials]


def subject_of(number: int, text: str, payload: Mapping[str, Any] | None = None) -> Subject:
    """What rules look at of a stored post, or of a text alone. `number` decides whether a sample takes it."""
    payload = payload or {}
    data = payload.get("data")
    post: dict[str, Any] = dict(data) if isinstance(data, dict) else {}
    includes = payload.get("includes")
    users = includes.get("users") if isinstance(includes, dict) else None
    names = [user.get("username") for user in users or () if isinstance(user, dict)]
    author_id = str(post.get("author_id") or "")
    return Subject(
        {**post, "text": text, "author_id": author_id, "username": str(names[0] if names else "").lower()}, number
    )


def _readable(value: str) -> Rule | str:
    try:
        return parse(value)
    except RuleSyntaxError as error:
        return str(error)
