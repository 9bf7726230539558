"""Calls allowed in a window of time, counted as the X API counts them: a window opens with its first call."""

import math
from collections.abc import Callable


class Window:
    """At most `limit` calls in each window of `seconds`."""

    def __init__(self, limit: int, seconds: float, clock: Callable[[], float]) -> None:
        """`clock` gives unix seconds: clients are told the moment of the reset."""
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        self._used = 0
        self._reset_at = 0.0

    def take(self) -> bool:
        """Count a call; whether it is allowed."""
        self._turn()
        if self._used >= self._limit:
            return False
        self._used += 1
        return True

    def headers(self) -> dict[str, str]:
        """What the X API tells about the window in every answer."""
        self._turn()
        return {
            "x-rate-limit-limit": str(self._limit),
            "x-rate-limit-remaining": str(self._limit - self._used),
            "x-rate-limit-reset": str(math.ceil(self._reset_at)),
        }

    def _turn(self) -> None:
        now = self._clock()
        if now >= self._reset_at:
            self._used, self._reset_at = 0, now + self._seconds
