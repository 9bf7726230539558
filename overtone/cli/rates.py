"""How fast the stack works, from two looks at its `/metrics`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

_PREDICT_ROUTES = ("/predict", "/predict/batch")


@dataclass(frozen=True, slots=True)
class Look:
    """What `/metrics` said at one moment."""

    at: float
    """Seconds of a monotonic clock."""
    posts: float = 0.0
    predictions: float = 0.0
    requests: float = 0.0
    """Prediction requests answered."""
    durations: Mapping[float, float] = field(default_factory=dict)
    """Prediction requests answered within so many seconds, by upper bound."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Between two looks."""

    posts_per_s: float
    predictions_per_s: float
    requests_per_s: float
    p50_ms: float | None
    """Median time of a prediction request; None when there was none."""


def read_metrics(text: str, at: float) -> Look:
    """The figures in `text`, which is in Prometheus format."""
    posts = predictions = requests = 0.0
    durations: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "overtone_ingest_posts_stored_total":
                posts += sample.value
            elif sample.name == "overtone_ingest_predictions_stored_total":
                predictions += sample.value
            elif sample.labels.get("route") not in _PREDICT_ROUTES:
                continue
            elif sample.name == "http_request_duration_seconds_bucket":
                bound = float(sample.labels["le"])
                durations[bound] = durations.get(bound, 0.0) + sample.value
            elif sample.name == "http_request_duration_seconds_count":
                requests += sample.value
    return Look(at, posts, predictions, requests, durations)


def between(before: Look, after: Look) -> Rates:
    """The rates from one look to a later one; a counter that fell was reset and counts from 0."""
    seconds = max(after.at - before.at, 1e-6)
    return Rates(
        posts_per_s=_grown(before.posts, after.posts) / seconds,
        predictions_per_s=_grown(before.predictions, after.predictions) / seconds,
        requests_per_s=_grown(before.requests, after.requests) / seconds,
        p50_ms=_median_ms(
            {bound: _grown(before.durations.get(bound, 0.0), count) for bound, count in after.durations.items()}
        ),
    )


class RateMeter:
    """Looks at the `/metrics` of one API, now and then."""

    def __init__(self, api_url: str) -> None:
        self._client = httpx.Client(base_url=api_url, timeout=5.0, trust_env=False)
        self._last: Look | None = None

    def look(self) -> Rates | None:
        """The rates since the last look; None at the first one and while the API does not answer."""
        try:
            answer = self._client.get("/metrics")
            if answer.status_code != httpx.codes.OK:
                return None
            look = read_metrics(answer.text, time.monotonic())
        except (httpx.HTTPError, ValueError):
            return None
        before, self._last = self._last, look
        return between(before, look) if before else None

    def is_ready(self) -> bool:
        """Whether the API says that it takes work."""
        return self._status_of("/ready") == httpx.codes.OK

    def is_answering(self) -> bool:
        """Whether the API gives any answer at all."""
        return self._status_of("/health") is not None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _status_of(self, path: str) -> int | None:
        try:
            return self._client.get(path).status_code
        except httpx.HTTPError:
            return None


def _grown(before: float, after: float) -> float:
    return after - before if after >= before else after


def _median_ms(within: Mapping[float, float]) -> float | None:
    """The median by linear interpolation within its bucket, as Prometheus' histogram_quantile has it."""
    bounds = sorted(within)
    total = within[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    lower_bound = lower_count = 0.0
    for bound in bounds:
        if within[bound] >= total / 2:
            if bound == float("inf"):
                return lower_bound * 1000
            share = (total / 2 - lower_count) / max(within[bound] - lower_count, 1e-9)
            return (lower_bound + (bound - lower_bound) * share) * 1000
        lower_bound, lower_count = bound, within[bound]
    return lower_bound * 1000
