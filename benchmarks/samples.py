"""What rows of requests say: rates, percentiles, goodput, recovery. Pure arithmetic on what the client wrote down.

Rows are float64 [requests, 4]: due, sent, answered (seconds from the start) and the HTTP status, as
`benchmarks.client` writes them.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figures:
    """One stretch of load. Rates in requests a second, times in milliseconds."""

    requests: int
    requests_per_s: float
    """Answered with 200: over the stretch of an open loop; of a closed one, while all connections were busy."""
    p50_ms: float
    p99_ms: float
    max_ms: float
    statuses: dict[str, int] = field(default_factory=dict)
    refusal_p99_ms: float = 0.0
    """Of answers with 429 or 503."""
    late_p99_ms: float = 0.0
    """How long after they were due requests were sent: the generator's own fault, and in every latency."""


def percentile(values: Rows | list[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed; 0 of none."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not ordered.size:
        return 0.0
    return float(ordered[max(0, int(np.ceil(share * ordered.size)) - 1)])


def closed_figures(rows: Rows, connections: int, counted_from: float) -> Figures:
    """Of a closed loop over so many `connections`, without the answers before `counted_from`.

    The rate is that between the answers to the first request of every connection and the last request sent. A request
    that was under way at either end counts by the share of its time that lies between them: what was half done at the
    start would be a gift otherwise, of a tenth where few large requests share every batch.
    """
    counted = rows[rows[:, 2] >= counted_from]
    good = rows[rows[:, 3] == 200]
    if not good.size:
        return _figures(counted, 0.0)
    first = rows[np.argsort(rows[:, 1], kind="stable")][:connections]
    start, end = max(counted_from, float(first[:, 2].max())), float(rows[:, 1].max())
    if end <= start:
        start, end = float(rows[:, 1].min()), float(rows[:, 2].max())
    within = np.minimum(good[:, 2], end) - np.maximum(good[:, 1], start)
    shares = np.clip(within, 0.0, None) / np.maximum(good[:, 2] - good[:, 1], 1e-9)
    return _figures(counted, float(shares.sum()) / max(end - start, 1e-9))


def open_figures(rows: Rows, start: float, end: float) -> Figures:
    """Of an open loop: latencies of what was due from `start` to `end`, and the rate of good answers in that time."""
    good = rows[rows[:, 3] == 200]
    done = int(((good[:, 2] >= start) & (good[:, 2] < end)).sum())
    due = rows[(rows[:, 0] >= start) & (rows[:, 0] < end)]
    return _figures(due, done / (end - start))


def recovery_s(rows: Rows, end: float, usual_ms: float) -> float:
    """Seconds after `end` from when on all requests that were due got a 200 within `usual_ms`; infinite if never."""
    after = rows[rows[:, 0] >= end]
    if not after.size:
        return float("inf")
    bad = after[(after[:, 3] != 200) | ((after[:, 2] - after[:, 0]) * 1000 > usual_ms)]
    if not bad.size:
        return 0.0
    last = float(bad[:, 0].max())
    return round(last - end, 3) if last < after[:, 0].max() else float("inf")


def growth(samples: list[float]) -> float:
    """By what share the last third of `samples` exceeds the third before it; what came first is warm-up."""
    third = len(samples) // 3
    if not third:
        return 0.0
    return round(float(np.median(samples[-third:]) / np.median(samples[-2 * third : -third])) - 1, 4)


def _figures(rows: Rows, rate: float) -> Figures:
    latencies = (rows[:, 2] - rows[:, 0]) * 1000
    good = latencies[rows[:, 3] == 200]
    refused = latencies[np.isin(rows[:, 3], (429, 503))]
    return Figures(
        requests=len(rows),
        requests_per_s=round(rate, 3),
        p50_ms=round(percentile(good, 0.50), 3),
        p99_ms=round(percentile(good, 0.99), 3),
        max_ms=round(percentile(good, 1.0), 3),
        statuses={str(int(status)): count for status, count in sorted(Counter(rows[:, 3]).items())},
        refusal_p99_ms=round(percentile(refused, 0.99), 3),
        late_p99_ms=round(percentile((rows[:, 1] - rows[:, 0]) * 1000, 0.99), 3),
    )
