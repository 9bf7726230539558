"""The simulator's stream rules: adding, deleting and listing them with the X API's answers and refusals."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any

MAX_RULES = 1_000
MAX_RULE_CHARS = 1_024
_PROBLEMS = "https://api.x.com/2/problems/"


Predicate = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as the X API keeps it."""

    rule_id: str
    value: str
    tag: str | None

    def shown(self) -> dict[str, str]:
        """The rule as it appears in answers."""
        tag = {} if self.tag is None else {"tag": self.tag}
        return {"id": self.rule_id, "value": self.value, **tag}

    def matched(self) -> dict[str, str]:
        """The rule as it appears in `matching_rules`."""
        return {"id": self.rule_id} if self.tag is None else {"id": self.rule_id, "tag": self.tag}


class Rulebook:
    """The active rules. Their syntax is checked only as far as length, quotes and brackets go."""

    def __init__(self, parse: Callable[[str], Predicate] | None = None) -> None:
        """With `parse` rules are evaluated, and those that it cannot read (ValueError) are refused."""
        self._rules: dict[str, Rule] = {}
        self._parse = parse
        self._predicates: dict[str, Predicate] = {}
        self._numbers = count(1)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The active rules, oldest first."""
        return tuple(self._rules.values())

    def listing(self) -> dict[str, Any]:
        """The answer to GET rules."""
        shown: dict[str, Any] = {"data": [rule.shown() for rule in self.rules]} if self._rules else {}
        return {**shown, "meta": {"sent": _now(), "result_count": len(self._rules)}}

    def matches(self, rule: Rule, subject: Any) -> bool:
        """Whether `rule`, one of `rules`, matches `subject`. Only with `parse`."""
        return self._predicates[rule.value](subject)

    def change(self, body: Any, *, dry_run: bool = False, delete_all: bool = False) -> tuple[int, dict[str, Any]]:
        """Status and answer to POST rules."""
        if delete_all:
            body = {"delete": {"ids": list(self._rules)}}
        if not isinstance(body, dict) or ("add" in body) == ("delete" in body):
            return 400, _invalid_request("The body must hold exactly one of `add` and `delete`.")
        before = dict(self._rules)
        try:
            answer = self._add(body["add"]) if "add" in body else self._delete(body["delete"])
        except (TypeError, KeyError, AttributeError):
            self._rules = before
            return 400, _invalid_request("`add` is a list of {value, tag}; `delete` is {ids} or {values}.")
        if dry_run:
            self._rules = before
        return (201 if "add" in body else 200), answer

    def _add(self, wanted: list[dict[str, str]]) -> dict[str, Any]:
        created: list[Rule] = []
        errors: list[dict[str, Any]] = []
        for item in wanted:
            value = item["value"]
            error = self._refusal(value)
            if error is not None:
                errors.append({"value": value, **error})
                continue
            rule = Rule(f"{1_700_000_000_000_000_000 + next(self._numbers)}", value, item.get("tag"))
            self._rules[rule.rule_id] = rule
            created.append(rule)
        summary = {
            "created": len(created),
            "not_created": len(errors),
            "valid": len(created),
            "invalid": len(errors),
        }
        answer: dict[str, Any] = {"meta": {"sent": _now(), "summary": summary}}
        if created:
            answer["data"] = [rule.shown() for rule in created]
        if errors:
            answer["errors"] = errors
        return answer

    def _delete(self, wanted: dict[str, list[str]]) -> dict[str, Any]:
        ids = {str(rule_id) for rule_id in wanted.get("ids", ())}
        values = set(wanted.get("values", ()))
        found = [rule for rule in self.rules if rule.rule_id in ids or rule.value in values]
        for rule in found:
            del self._rules[rule.rule_id]
        missing = max(len(ids) + len(values) - len(found), 0)
        return {"meta": {"sent": _now(), "summary": {"deleted": len(found), "not_deleted": missing}}}

    def _refusal(self, value: str) -> dict[str, str] | None:
        if any(rule.value == value for rule in self.rules):
            return _problem("DuplicateRule", "duplicate-rules", "A rule with this value exists already.")
        if len(self._rules) >= MAX_RULES:
            return _problem("RulesCapExceeded", "rule-cap", f"There may be {MAX_RULES} rules.")
        if not value.strip() or len(value) > MAX_RULE_CHARS:
            return _problem("UnprocessableEntity", "invalid-rules", f"A rule has 1 to {MAX_RULE_CHARS} characters.")
        if value.count('"') % 2 or value.count("(") != value.count(")"):
            return _problem("UnprocessableEntity", "invalid-rules", "Quotes and brackets must come in pairs.")
        try:
            if self._parse is not None:
                self._predicates[value] = self._parse(value)
        except ValueError as error:
            return _problem("UnprocessableEntity", "invalid-rules", f"The rule cannot be read: {error}.")
        return None


def _problem(title: str, kind: str, detail: str) -> dict[str, str]:
    return {"title": title, "type": _PROBLEMS + kind, "detail": detail}


def _invalid_request(detail: str) -> dict[str, str]:
    return _problem("Invalid Request", "invalid-request", detail)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
