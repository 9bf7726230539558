"""How the simulator behaves when nothing is broken."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "stream": 50,
        "rules_read": 450,
        "rules_change": 100,
        "search": 450,
        "usage": 50,
        "connections": 25,
        "compliance": 150,
        "compliance_stream": 100,
    }
)
"""Calls allowed in a window, by the name of the kind of call: X's own figures."""

_Count = Annotated[int, Field(ge=1, le=1_000_000_000)]


class SimulatorOptions(BaseModel):
    """Values of a run; times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(50.0, gt=0, le=50_000)
    """Posts published a second."""
    limit: _Count | None = None
    """Posts published in all; then only keep-alives. None for no end."""
    history_s: float = Field(0.0, ge=0, le=7 * 86_400)
    """For how long it has published already when it starts: what a first search or replay can find."""
    seed: int = 0
    """Of the posts and of every choice that a scenario leaves open."""
    posts: Path | None = None
    """A file of texts to send, over and over; None for generated ones."""
    token: str | None = None
    """The only bearer token that is taken; any when None."""
    keep_alive_s: float = Field(10.0, gt=0, le=3_600)
    connects_per_window: _Count = LIMITS["stream"]
    """Connections to the stream allowed in a window."""
    limits: dict[str, _Count] = {}
    """Other calls allowed in a window, by the names of `LIMITS`."""
    window_s: float = Field(900.0, gt=0, le=86_400)
    max_connections: int = Field(1, ge=1, le=100)
    """Connections to the stream at a time."""
    replaces_connection: bool = False
    """Whether one connection too many ends the oldest one instead of being refused; X is said to do either."""
    cap_posts: _Count | None = None
    """Posts that may be read, by stream and search together, before X says that the usage cap is reached."""
    has_backfill: bool = False
    """Whether `backfill_minutes`, `start_time` and `end_time` are taken, as on the Enterprise plan."""
    evaluates_rules: bool = False
    """Whether rules and search queries are evaluated. Without, every post counts as matched by one of the rules."""
    gzips: bool = False
    """Whether the stream is packed for a client that takes gzip."""

    @field_validator("limits")
    @classmethod
    def _known_limits(cls, limits: dict[str, int]) -> dict[str, int]:
        unknown = sorted(limits.keys() - LIMITS.keys() | (limits.keys() & {"stream"}))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: none of {', '.join(name for name in LIMITS if name != 'stream')}")
        return limits

    def calls_per_window(self, name: str) -> int:
        """How many calls of the kind `name` a window allows."""
        return self.connects_per_window if name == "stream" else self.limits.get(name, LIMITS[name])
