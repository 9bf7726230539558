"""What can go wrong on purpose: the words of `POST /simulator/faults` and of the steps of a scenario."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ingest.simulator.answers import Reason

_TIME = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")

Unit = Literal["", "s", "posts", "lines", "bytes", "requests", "authors", "on"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault."""

    unit: Unit
    """What its amount counts; empty where it has none."""
    default: float
    most: float
    effect: str


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "close": Kind("", 1, 1, "the stream ends as if all were well"),
        "reset": Kind("", 1, 1, "the TCP connection is reset"),
        "disconnect": Kind("", 1, 1, "an operational-disconnect message, then the end of the stream"),
        "stall": Kind("s", 30, 3_600, "silence, without keep-alives"),
        "slow": Kind("s", 5, 3_600, "bytes come a few at a time"),
        "garbage": Kind("lines", 1, 10_000, "lines that are not JSON"),
        "error_line": Kind("lines", 1, 10_000, "lines that hold errors and no post"),
        "giant_line": Kind("bytes", 1_048_576, 67_108_864, "the next post comes in a line as long as this"),
        "missing_tag": Kind("posts", 1, 1_000_000, "matching rules come without their tag"),
        "unknown_fields": Kind("posts", 1, 1_000_000, "posts carry fields that nobody documents"),
        "partial_error": Kind("posts", 1, 1_000_000, "posts carry an error beside their data"),
        "split_utf8": Kind("posts", 10, 10_000, "characters are cut in two by the ends of chunks"),
        "duplicate": Kind("posts", 50, 100_000, "the last posts come again"),
        "out_of_order": Kind("posts", 50, 10_000, "the next posts come shuffled"),
        "gzip": Kind("on", 1, 1, "1: the next connections are packed; 0: they are not"),
        "refuse": Kind("requests", 1, 100_000, "the next connections are answered with `status` (and `reason`)"),
        "search_down": Kind("s", 30, 3_600, "search answers `status`, 503"),
        "silence": Kind("", 1, 1, "no post is published any more; what was published can still be read"),
        "delete": Kind("posts", 1, 100_000, "authors delete posts"),
        "drop": Kind("posts", 1, 100_000, "posts are hidden for a while"),
        "undrop": Kind("posts", 1, 100_000, "hidden posts are shown again"),
        "withhold": Kind("posts", 1, 100_000, "posts are withheld in some countries"),
        "edit": Kind("posts", 1, 100_000, "posts are replaced by a later version"),
        "scrub_geo": Kind("authors", 1, 10_000, "authors take the places out of their posts"),
        "user_delete": Kind("authors", 1, 10_000, "authors delete their account"),
        "user_undelete": Kind("authors", 1, 10_000, "authors take that back"),
        "user_protect": Kind("authors", 1, 10_000, "authors protect their posts"),
        "user_unprotect": Kind("authors", 1, 10_000, "authors take that back"),
        "user_suspend": Kind("authors", 1, 10_000, "authors are suspended"),
        "user_unsuspend": Kind("authors", 1, 10_000, "authors are let back in"),
    }
)

COMPLIANCE = frozenset(name for name in KINDS if name.startswith("user_")) | {
    "delete", "drop", "undrop", "withhold", "edit", "scrub_geo",
}  # fmt: skip
"""Kinds that change what may be kept, and are told by the compliance streams."""


def seconds(value: Any) -> Any:
    """A number of seconds from `12`, `2.5s`, `10m` or `1h30m`; whatever else it is stays as it is."""
    if not isinstance(value, str):
        return value
    found = _TIME.fullmatch(value.strip())
    if not value.strip() or found is None:
        raise ValueError("must be a time such as 2.5s, 10m or 1h30m")
    hours, minutes, rest = (float(part or 0) for part in found.groups())
    return hours * 3_600 + minutes * 60 + rest


Seconds = Annotated[float, BeforeValidator(seconds)]


class Fault(BaseModel):
    """One fault."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    amount: Annotated[float | None, BeforeValidator(seconds)] = None
    """How much of it, in the unit of its kind; None for the kind's default."""
    status: Literal[400, 401, 403, 404, 409, 429, 500, 502, 503, 504] = 503
    """Of a refusal, and of searches that are down."""
    reason: Reason = "rate_limit"
    """Of a refusal with 429."""
    ids: tuple[int, ...] = Field((), max_length=100_000)
    """Posts or authors of a fault that concerns some; without, as many as `amount` says are drawn."""

    @model_validator(mode="after")
    def _fits_kind(self) -> "Fault":
        kind = KINDS.get(self.kind)
        if kind is None:
            raise ValueError(f"{self.kind!r} is no fault; there are {', '.join(KINDS)}")
        if self.amount is not None and not 0 <= self.amount <= kind.most:
            raise ValueError(f"the amount of {self.kind} must be from 0 to {kind.most:g} {kind.unit}".rstrip())
        if self.ids and self.kind not in COMPLIANCE:
            raise ValueError(f"{self.kind} concerns no ids")
        return self

    @property
    def size(self) -> float:
        """`amount`, or the default of the kind."""
        return KINDS[self.kind].default if self.amount is None else self.amount
