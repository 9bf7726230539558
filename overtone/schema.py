"""The wire types that more than one package speaks: post -> prediction.

Plain frozen dataclasses for what flows inside the system at stream rates; the HTTP request and response models,
with their validation and their OpenAPI text, are in `serve.wire`.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

LABELS = ("negative", "neutral", "positive")
"""The labels of the default bundle, in the order of its scores."""

MAX_TEXT_CHARS = 25_000
"""The longest text the API takes, in characters: the length of the longest post X allows."""

MAX_BATCH_TEXTS = 10_000
"""The most texts one request may carry."""

MAX_SINCE_DAYS = 3650
"""How far back a job of re-scoring may be told to go."""

REPORT_DAYS, MAX_REPORT_DAYS = 7, 90
"""How many days a report is about, unless it is told, and at most."""

_SNOWFLAKE_EPOCH_MS = 1_288_834_974_657


@dataclass(frozen=True, slots=True)
class Post:
    """One post as it is stored."""

    post_id: int
    author_id: int
    text: str
    created_at: datetime
    lang: str | None = None
    rule_tags: tuple[str, ...] = ()
    payload: dict[str, Any] = field(default_factory=dict)
    """The object the X API sent, without the fields above being taken out."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of one text."""

    label: str
    confidence: float
    """Calibrated probability of `label`."""
    scores: dict[str, float]
    """Calibrated probability by label; they sum to 1."""
    model_version: str


def snowflake_to_datetime(post_id: int) -> datetime:
    """The instant, to the millisecond, at which X made `post_id` (ids are snowflakes)."""
    return datetime.fromtimestamp(((post_id >> 22) + _SNOWFLAKE_EPOCH_MS) / 1000, tz=UTC)


def datetime_to_snowflake(instant: datetime) -> int:
    """The smallest post id that can have been made at `instant` (0 for instants before the epoch of ids)."""
    ms = int(instant.timestamp() * 1000) - _SNOWFLAKE_EPOCH_MS
    return max(ms, 0) << 22
