"""How many replicas the waiting work needs: measured in each replica, decided by Serve's controller.

Below, the same for the consumers of tasks, by the length of their queue. Ray's own policy for that would have to be
given the broker's address, with its password, where everybody in the cluster can read it.

Serve's own policy counts requests, which says little: a request may hold one text or ten thousand, and the prediction
routes do not pass through Serve's count at all. This one counts the engine's work in replicas: the share of time that
the engines are busy, and the tokens that wait, over the tokens that an engine does in the time they may wait.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

TARGET_BUSY = 0.75
"""Share of time that engines are to be busy; above it replicas are added."""
DRAIN_S = 5.0
"""Seconds within which what waits is to be done."""
TASKS_A_CONSUMER = 16
"""Tasks that may wait for each consumer of them before another one comes."""
_TOKENS_PER_S = 2_000.0
"""Of a replica that has not measured itself yet."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one engine has before and behind it."""

    waiting_tokens: int
    done_tokens: int
    """Padded tokens since the start."""
    busy_s: float
    """Seconds since the start."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica reports."""

    waiting_tokens: float
    tokens_per_s: float
    """What the engine does while it is busy; 0 if not known."""
    busy: float
    """Share of time, 0 to 1."""


def replicas_for(loads: Iterable[Load], *, minimum: int, maximum: int) -> int:
    """The replicas that `loads`, one a replica, need: within bounds, and never fewer for more work."""
    work = 0.0
    for load in loads:
        rate = load.tokens_per_s or _TOKENS_PER_S
        work += min(max(load.busy, 0.0), 1.0) + max(load.waiting_tokens, 0.0) / (rate * DRAIN_S)
    # Rounding errors of sums must not cost a replica.
    return min(max(math.ceil(work / TARGET_BUSY - 1e-6), minimum), maximum)


class LoadMeter:
    """The load of one replica between two looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._before = Work(0, 0, 0.0)

    def measure(self, work: Work) -> dict[str, float]:
        """The load since the last call, as Serve carries it."""
        now = self._clock()
        elapsed, busy_s = now - self._at, work.busy_s - self._before.busy_s
        tokens = work.done_tokens - self._before.done_tokens
        self._at, self._before = now, work
        return {
            "waiting_tokens": float(work.waiting_tokens),
            "tokens_per_s": tokens / busy_s if busy_s > 0 else 0.0,
            "busy": min(1.0, busy_s / elapsed) if elapsed > 0 else 0.0,
        }


def scale_by_waiting_tokens(context: Any) -> tuple[int, dict[str, Any]]:
    """A policy of Ray Serve 2.60: its `AutoscalingContext` in, the wanted number of replicas out.

    Serve itself then applies the delays of the deployment's `autoscaling_config`.
    """
    metrics = context.aggregated_metrics or {}
    replicas = {replica for values in metrics.values() for replica in values}

    def of(name: str, replica: Any) -> float:
        return float(metrics.get(name, {}).get(replica, 0.0))

    loads = [Load(of("waiting_tokens", it), of("tokens_per_s", it), of("busy", it)) for it in replicas]
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    # Without a report, as while all replicas start, nothing is known: stay.
    wanted = replicas_for(loads, minimum=low, maximum=high) if loads else context.target_num_replicas
    return wanted, {}


def consumers_for(waiting: float, *, minimum: int, maximum: int) -> int:
    """The consumers that a queue of so many tasks needs, within bounds."""
    return min(max(math.ceil(waiting / TASKS_A_CONSUMER), minimum), maximum)


def scale_by_queue(context: Any) -> tuple[int, dict[str, Any]]:
    """A policy for consumers of tasks, as above: by the length of their queue, which each of them reports."""
    reports = (context.aggregated_metrics or {}).get("queue_length", {})
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    if not reports:
        return context.target_num_replicas, {}
    return consumers_for(max(reports.values()), minimum=low, maximum=high), {}
