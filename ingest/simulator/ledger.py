"""What the simulator sent: three bits a post, and counts. A million posts take a megabyte."""

from collections import Counter, deque
from collections.abc import Iterator

STREAMED = 1
FOUND = 2
"""Sent as the answer to a search."""
GONE = 4
"""Deleted by its author, hidden, or of an author who is gone."""

LEDGER_WINDOW_S = 900.0
"""The window in which requests for the stream are counted: X's own, however short the limits' windows are."""


class Ledger:
    """Marks by position in the timeline, which counts on for ever; the oldest are forgotten as the timeline does."""

    def __init__(self, window_s: float) -> None:
        self.streamed = 0
        """Posts sent on streams, repetitions included."""
        self.found = 0
        """Posts sent as answers to searches, repetitions included."""
        self.connects = 0
        self.attempts = 0
        """Requests for the stream, refused ones included."""
        self.most_attempts = 0
        """The most requests for the stream within any one window."""
        self.faults: Counter[str] = Counter()
        self._window_s = window_s
        self._recent: deque[float] = deque()
        self._marks = bytearray()
        self._forgotten = 0

    @property
    def reads(self) -> int:
        """Posts that X would bill, were it not to bill repetitions once a day."""
        return self.streamed + self.found

    def mark(self, position: int, what: int) -> None:
        """Note `what` about the post at `position`."""
        index = position - self._forgotten
        if index >= len(self._marks):
            self._marks.extend(bytes(index + 1 - len(self._marks)))
        if index >= 0:
            self._marks[index] |= what

    def has(self, position: int, what: int) -> bool:
        """Whether `what` was noted about the post at `position`."""
        index = position - self._forgotten
        return 0 <= index < len(self._marks) and bool(self._marks[index] & what)

    def unmark(self, position: int, what: int) -> None:
        """Take `what` back."""
        if self.has(position, what):
            self._marks[position - self._forgotten] &= ~what & 0xFF

    def positions(self, what: int) -> Iterator[int]:
        """The positions about which `what` was noted, ascending."""
        return (self._forgotten + index for index, mark in enumerate(self._marks) if mark & what)

    def note_attempt(self, now: float) -> None:
        """Count a request for the stream at `now` (seconds of any steady clock)."""
        self.attempts += 1
        self._recent.append(now)
        while now - self._recent[0] >= self._window_s:
            self._recent.popleft()
        self.most_attempts = max(self.most_attempts, len(self._recent))

    def forget_before(self, position: int) -> None:
        """Drop the marks of positions before `position`."""
        if position > self._forgotten:
            del self._marks[: position - self._forgotten]
            self._forgotten = position
