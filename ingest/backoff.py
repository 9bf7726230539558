"""How long to wait before the next connection, by the X API's rules. Pure arithmetic on a clock that is passed in."""

import random
from collections.abc import Callable, Iterable
from enum import StrEnum

_NETWORK_STEP_S = 0.25
_NETWORK_MAX_S = 16.0
_HTTP_FIRST_S = 5.0
_HTTP_MAX_S = 320.0
_THROTTLED_FIRST_S = 60.0
_THROTTLED_MAX_S = 960.0
_JITTER = 0.25


class Failure(StrEnum):
    """Why a connection ended or did not come about, as far as waiting is concerned."""

    NETWORK = "network"
    """Broken, silent or cleanly closed by the other side."""
    HTTP = "http"
    """Refused with a status that may pass, such as 503."""
    THROTTLED = "throttled"
    """Refused with 429."""


class Backoff:
    """Waits that grow with the failures in a row; each kind of failure grows by its own rule.

    Network: at once, then 0.25 s more each time up to 16 s. HTTP: from 5 s, doubled up to 320 s. Throttled: from 60 s,
    doubled up to 960 s. Up to a quarter is added at random so that many clients do not come back together.
    """

    def __init__(self, dice: random.Random | None = None) -> None:
        self._dice = dice or random.Random()
        self._in_a_row: dict[Failure, int] = {}

    def reset(self) -> None:
        """Forget the failures: the connection proved good."""
        self._in_a_row.clear()

    def next_s(self, failure: Failure, at_least_s: float = 0.0) -> float:
        """Count `failure` and return the seconds to wait, never less than `at_least_s`."""
        earlier = self._in_a_row.get(failure, 0)
        self._in_a_row[failure] = earlier + 1
        wait_s = max(_wait_s(failure, earlier), at_least_s)
        return wait_s * (1 + self._dice.uniform(0, _JITTER))


class ConnectBudget:
    """Keeps connections to at most `limit` in any window of `window_s` seconds.

    A bucket: half of the limit may be used at once, the rest comes back evenly over the window, so that after a bad
    spell there is a connection to be had every minute or so instead of none for a quarter of an hour.
    """

    def __init__(self, clock: Callable[[], float], *, limit: int = 50, window_s: float = 900.0) -> None:
        self._clock = clock
        self._capacity = limit / 2
        self._per_second = limit / 2 / window_s
        self._level = self._capacity
        self._measured_at = clock()
        self._closed_until = 0.0

    def wait_s(self) -> float:
        """Seconds until the next connection may be tried; 0 when now."""
        self._refill()
        missing = max(1.0 - self._level, 0.0)
        return max(missing / self._per_second, self._closed_until - self._clock(), 0.0)

    def spend(self) -> None:
        """Count a request that reached the X API."""
        self._refill()
        self._level -= 1.0

    def give_back(self) -> None:
        """Take back a request that never reached the X API."""
        self._refill()
        self._level = min(self._level + 1.0, self._capacity)

    def remember(self, ages_s: Iterable[float]) -> None:
        """Count requests that others made so many seconds ago, in place of what was counted here."""
        level, before = self._capacity, None
        for age_s in sorted(ages_s, reverse=True):
            if before is not None:
                level = min(self._capacity, level + (before - age_s) * self._per_second)
            level, before = level - 1.0, age_s
        self._level = min(self._capacity, level + max(before or 0.0, 0.0) * self._per_second)
        self._measured_at = self._clock()

    def learn(self, remaining: int, reset_in_s: float) -> None:
        """Take over what the X API says: with `remaining` 0 nothing is allowed for `reset_in_s` seconds."""
        if remaining <= 0:
            self._closed_until = self._clock() + max(reset_in_s, 0.0)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._measured_at) * self._per_second)
        self._measured_at = now


def _wait_s(failure: Failure, earlier: int) -> float:
    if failure is Failure.NETWORK:
        return min(earlier * _NETWORK_STEP_S, _NETWORK_MAX_S)
    if failure is Failure.HTTP:
        return min(_HTTP_FIRST_S * 2.0 ** min(earlier, 16), _HTTP_MAX_S)
    return min(_THROTTLED_FIRST_S * 2.0 ** min(earlier, 16), _THROTTLED_MAX_S)
