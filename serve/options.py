"""What a caller may ask of a prediction beside the text: parsed strictly, each mistake named by its field."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.bodies import FieldError, invalid
from serve.longtext import LONG_TEXT_POLICIES, LongText

_FIELD_NAME = re.compile(r"\w{1,50}")
_INTEGER = re.compile(r"\d{1,9}", re.ASCII)
_NUMBER = re.compile(r"\d{1,9}(?:\.\d{0,18})?", re.ASCII)
_MAX_TOP_K = 10**9


@dataclass(frozen=True, slots=True)
class Options:
    """How a prediction is made and shown."""

    top_k: int | None = None
    """Labels shown, the best first. None: all, in the bundle's order."""
    threshold: float | None = None
    """A label is only given with at least this confidence."""
    long_text: LongText = "truncate"
    explain: bool = False

    def check_labels(self, labels: int) -> None:
        """Refuse more labels than the `labels` of the bundle.

        Raises:
            InvalidInputError: naming the field.
        """
        if self.top_k is not None and self.top_k > labels:
            raise invalid([FieldError("top_k", f"must be an integer from 1 to {labels}", labels, self.top_k)])


PLAIN = Options()
NAMES = ("top_k", "threshold", "long_text", "explain")


def split(body: Any, name: str, defaults: Options = PLAIN) -> tuple[Any, Options]:
    """The field `name` of a body, unchecked, and the options beside it; without any, `defaults` itself.

    Raises:
        InvalidInputError: not an object, `name` is missing, or naming the field that is unknown or wrong.
    """
    if not isinstance(body, dict):
        raise invalid([FieldError("body", f"must be a JSON object with the field {name}")])
    if name not in body:
        raise invalid([FieldError(name, "is required")])
    if len(body) == 1:
        return body[name], defaults
    _refuse_unknown(body, (name, *NAMES))
    return body[name], _checked(body, defaults)


def from_query(pairs: Iterable[tuple[str, str]]) -> Options:
    """The options in the query of an address.

    Raises:
        InvalidInputError: naming the parameter that is unknown, repeated or wrong.
    """
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise invalid([FieldError(_shown(name), "is given twice")])
        values[name] = _from_text(name, value)
    _refuse_unknown(values, NAMES)
    return _checked(values, PLAIN)


def _from_text(name: str, value: str) -> Any:
    if name == "top_k" and _INTEGER.fullmatch(value):
        return int(value)
    if name == "threshold" and _NUMBER.fullmatch(value):
        return float(value)
    if name == "explain" and value in {"true", "false"}:
        return value == "true"
    return value


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise invalid([FieldError(_shown(unknown), f"is not known here; known are {', '.join(known)}")])


def _shown(name: str) -> str:
    return name if _FIELD_NAME.fullmatch(name) else "body"


def _checked(given: Mapping[str, Any], defaults: Options) -> Options:
    values = {name: given.get(name, getattr(defaults, name)) for name in NAMES}
    problems: list[FieldError] = []
    top_k, threshold = values["top_k"], values["threshold"]
    if isinstance(top_k, float) and top_k.is_integer():
        values["top_k"] = top_k = int(top_k)
    if "top_k" in given and (not _is_number(top_k, int) or not 1 <= top_k <= _MAX_TOP_K):
        problems.append(FieldError("top_k", "must be an integer from 1 to the number of labels", 1))
    if "threshold" in given and (not _is_number(threshold, int | float) or not 0 <= threshold <= 1):
        problems.append(FieldError("threshold", "must be a number from 0 to 1", 1))
    if values["long_text"] not in LONG_TEXT_POLICIES:
        problems.append(FieldError("long_text", f"must be one of {', '.join(LONG_TEXT_POLICIES)}"))
    if not isinstance(values["explain"], bool):
        problems.append(FieldError("explain", "must be true or false"))
    elif values["explain"] and values["long_text"] == "window":
        problems.append(FieldError("explain", "cannot be combined with long_text=window"))
    if problems:
        raise invalid(problems)
    return Options(**values)


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
