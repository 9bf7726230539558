"""Scenarios: a run of the simulator written down in YAML, its faults and when they come. Equal seeds, equal runs.

    name: a bad hour
    simulator: {rate: 500, limit: 100000, seed: 7}
    speed: 60                    # an hour in a minute
    steps:
      - {at: 5m, fault: reset}
      - {at_post: 20000, fault: duplicate, amount: 200}
      - {every: 10m, until: 1h, jitter: 2m, fault: [close, reset, disconnect]}
      - {at: 30m, fault: refuse, status: 503, amount: 6}

Times count from the first connection and are divided by `speed`, amounts in seconds too.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ingest.simulator.faults import KINDS, Fault, Seconds
from ingest.simulator.options import SimulatorOptions
from overtone.errors import ConfigurationError

_MAX_FAULTS = 100_000

Time = Annotated[Seconds, Field(ge=0, le=7 * 86_400)]


class Step(BaseModel):
    """A fault, or several of which one is drawn each time, and when: exactly one of `at`, `at_post` and `every`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: tuple[str, ...]
    at: Time | None = None
    at_post: Annotated[int, Field(ge=1)] | None = None
    """How many posts have been published."""
    every: Annotated[Time, Field(gt=0)] | None = None
    until: Time | None = None
    """The end of `every`, which begins after its first interval."""
    jitter: Time = 0.0
    """How far `at` and `every` may come later; drawn each time."""
    amount: Any = None
    status: Any = 503
    reason: Any = "rate_limit"
    ids: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("fault"), str):
            return {**value, "fault": (value["fault"],)}
        return value

    @model_validator(mode="after")
    def _whole(self) -> "Step":
        if sum(moment is not None for moment in (self.at, self.at_post, self.every)) != 1:
            raise ValueError("give exactly one of at, at_post and every")
        if (self.every is None) != (self.until is None):
            raise ValueError("every and until come together")
        if not self.fault:
            raise ValueError("give at least one fault")
        for kind in self.fault:
            self.made(kind)
        return self

    def made(self, kind: str, *, speed: float = 1.0) -> Fault:
        """The fault of this step that is of `kind`, its seconds divided by `speed`."""
        given = Fault(kind=kind, amount=self.amount, status=self.status, reason=self.reason, ids=self.ids)
        if KINDS[kind].unit != "s":
            return given
        return given.model_copy(update={"amount": given.size / speed})


class Scenario(BaseModel):
    """A run of the simulator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", max_length=200)
    simulator: SimulatorOptions = SimulatorOptions()
    speed: float = Field(1.0, gt=0, le=100_000)
    """By what all times are divided."""
    steps: tuple[Step, ...] = Field((), max_length=10_000)

    def schedule(self) -> "Schedule":
        """The faults in the order in which they come."""
        rng = random.Random(f"scenario:{self.simulator.seed}")
        timed: list[tuple[float, Fault]] = []
        counted: list[tuple[int, Fault]] = []
        for step in self.steps:
            for moment in _moments(step):
                fault = step.made(rng.choice(step.fault), speed=self.speed)
                if step.at_post is not None:
                    counted.append((step.at_post, fault))
                else:
                    timed.append(((moment + rng.uniform(0, step.jitter)) / self.speed, fault))
                if len(timed) + len(counted) > _MAX_FAULTS:
                    raise ConfigurationError(f"the scenario has more than {_MAX_FAULTS} faults")
        return Schedule(deque(sorted(timed, key=_moment)), deque(sorted(counted, key=_moment)))


@dataclass(slots=True)
class Schedule:
    """Faults that are still to come: by seconds from the first connection, and by posts published."""

    timed: deque[tuple[float, Fault]]
    counted: deque[tuple[int, Fault]]

    def due(self, elapsed_s: float | None, published: int) -> list[Fault]:
        """Take out what is due after `elapsed_s` (None before the first connection) and with `published` posts."""
        found: list[Fault] = []
        while self.timed and elapsed_s is not None and self.timed[0][0] <= elapsed_s:
            found.append(self.timed.popleft()[1])
        while self.counted and self.counted[0][0] <= published:
            found.append(self.counted.popleft()[1])
        return found

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return not self.timed and not self.counted


def load_scenario(path: Path) -> Scenario:
    """The scenario in the YAML file at `path`.

    Raises:
        ConfigurationError: the file cannot be read, or names each value that is wrong.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error})") from error
    return parse_scenario(loaded, str(path))


def parse_scenario(value: Any, name: str = "scenario") -> Scenario:
    """The scenario that `value`, as YAML loads it, describes; `name` stands before each complaint.

    Raises:
        ConfigurationError: naming each value that is wrong.
    """
    try:
        scenario = Scenario.model_validate(value or {})
    except ValidationError as error:
        lines = [
            f"{name}: {_place(item['loc'])}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        ]
        raise ConfigurationError("\n".join(lines)) from None
    scenario.schedule()
    return scenario


def _moment(due: tuple[float, Fault]) -> float:
    return due[0]


def _moments(step: Step) -> Iterator[float]:
    if step.every is None or step.until is None:
        yield step.at or 0.0
        return
    moment = step.every
    while moment <= step.until:
        yield moment
        moment += step.every


def _place(where: tuple[int | str, ...]) -> str:
    return ".".join(str(part + 1) if isinstance(part, int) else part for part in where) or "the whole"
