"""The token batcher: requests of any size in, batches of like length out, every row answered exactly once.

Batches are pulled, not timed: when the engine frees, the best batch is chosen from all that waits. So a lone request
never waits for others to come, and under load batches fill by themselves. Choosing is `Backlog`, a data structure
without clock, task or future; admitting, running and answering is `TokenBatcher`, for use from one event loop. The
choice is made in the engine's own thread at the moment it frees: it neither idles until the event loop comes round, nor
is given a batch early that a more urgent text then comes too late for. Knows no engine, no HTTP and no Ray.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal, TypeVar

from overtone.errors import DeadlineExceededError, EngineError, OverloadedError, OvertoneError, ShuttingDownError

Row = TypeVar("Row")
TokenIds = list[int]
Priority = Literal["interactive", "bulk"]

BULK_TURN = 4
"""While both priorities wait, every batch of this number starts from the oldest bulk row."""

INTERACTIVE_WASTE = 8
"""While both priorities wait, an interactive row may add so many times more padding than others: left for the next
batch it would wait for this one too."""

BULK_BESIDE = 4
"""While both priorities wait, bulk rows fill a batch that starts with interactive ones to a share of its budget, one in
so many: enough that its fixed cost is shared, and little enough that nobody waits long for rows of others."""

_RATE_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Limits:
    """What a batcher may hold and run."""

    budget_tokens: int | None = None
    """Padded tokens a batch: rows times the longest. One longer row makes a batch of its own. Unset: 256."""
    waste_tokens: int | None = None
    """Padding that one further row may add to a batch. A batch of its own costs the engine about as much on a CPU as
    ten tokens, so a row that would add more padding than that waits for its like; GPUs want far more. Unset: 8."""
    max_interactive_texts: int = 1024
    """Interactive texts that may wait. A larger request is still taken when nothing of its priority waits."""
    max_bulk_texts: int = 20_000
    """Bulk texts that may wait; as above."""
    max_interactive_s: float = 0.75
    """Seconds of work, at the rate measured, behind which an interactive request is not queued."""
    max_bulk_s: float = 30.0
    """As above for a bulk request, for which interactive work counts too."""
    tokens_per_s: float | None = None
    """Of full batches, for as long as none was measured: single texts take far longer for each token, so that a queue
    would seem to take as many times longer as it does. Unset: the rate of whatever was run."""
    ahead: int = 1
    """Batches ordered before the engine frees, while at least `ahead_tokens` wait beside what is ordered already, so
    that it never idles. What is in them is chosen when it begins them."""
    ahead_tokens: int = 96
    """Less than a full batch: narrow batches end soon, and a gap between them costs more than a fuller one saves."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch was, for metrics."""

    texts: int
    tokens: int
    padded_tokens: int
    queue_s: float
    """From admission of its oldest row to the engine's beginning."""
    engine_s: float
    waiting: int
    """Texts that waited behind it when it was done."""


@dataclass(slots=True)
class Timing:
    """Where the time of one request went, by the batcher's clock; 0 for a mark that it has not passed."""

    started: float = 0.0
    """Its texts begin to be made into tokens."""
    admitted: float = 0.0
    taken: float = 0.0
    """The first of its rows was chosen for a batch."""
    done: float = 0.0
    """The last of its rows was answered."""

    def stages(self) -> list[tuple[str, float, float]]:
        """Name, start and end of each stage that was passed, in order."""
        stages = (
            ("tokenise", self.started, self.admitted),
            ("queue", self.admitted, self.taken),
            ("engine", self.taken, self.done),
        )
        return [(name, start, end) for name, start, end in stages if start and end]


@dataclass(slots=True, eq=False)
class Ticket(Generic[Row]):
    """One request on its way."""

    token_ids: Sequence[TokenIds]
    priority: Priority
    admitted_at: float = 0.0
    deadline: float | None = None
    taken_at: float = 0.0
    """When a batch took the first of its rows."""
    waiting: int = field(init=False)
    """Rows that no batch has taken."""
    waiting_tokens: int = field(init=False)
    taken: bytearray = field(init=False)
    cursor: int = 0
    """No row before it waits."""
    dead: bool = False
    """Given up by its caller or by its deadline; its rows are dropped where they are met."""
    results: list[Row | Exception | None] = field(init=False)
    unanswered: int = field(init=False)
    answer: "asyncio.Future[None] | None" = None

    def __post_init__(self) -> None:
        rows = len(self.token_ids)
        self.waiting = self.unanswered = rows
        self.waiting_tokens = sum(map(len, self.token_ids))
        self.taken = bytearray(rows)
        self.results = [None] * rows


Batch = list[tuple[Ticket[Row], int]]
"""Rows, each as its request and its place in it."""

Begin = Callable[[], list[TokenIds]]
"""Chooses the rows of a batch, maybe none. To be called once, when the engine begins it, from any thread."""


class Backlog(Generic[Row]):
    """All rows that wait, and the choice of the next batch among them.

    The choice: the oldest row, of interactive requests first, then again and again the row of that priority that adds
    least padding, then likewise of the other one, within `BULK_BESIDE`, until no further row fits the budget or every
    one would add too much padding. Every `BULK_TURN`th time, half of the budget is filled with bulk rows first. So a
    row is never passed over by more batches than there were rows before it. For use from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues = {"interactive": _Queue[Row](), "bulk": _Queue[Row]()}
        self._passed_over = 0

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return self._queues["interactive"].waiting + self._queues["bulk"].waiting

    @property
    def waiting_tokens(self) -> int:
        """Their tokens, without padding."""
        return self._queues["interactive"].waiting_tokens + self._queues["bulk"].waiting_tokens

    def waiting_of(self, priority: Priority) -> int:
        """Texts of `priority` that wait."""
        return self._queues[priority].waiting

    def waiting_tokens_of(self, priority: Priority) -> int:
        """Their tokens, without padding."""
        return self._queues[priority].waiting_tokens

    def add(self, ticket: Ticket[Row]) -> None:
        """Let the rows of `ticket` wait."""
        with self._lock:
            self._queues[ticket.priority].add(ticket)

    def drop(self, ticket: Ticket[Row]) -> None:
        """Forget the rows of `ticket` that wait."""
        with self._lock:
            if not ticket.dead:
                ticket.dead = True
                self._queues[ticket.priority].forget(ticket)

    def take(
        self, budget_tokens: int, now: float, waste_tokens: int | None = None
    ) -> tuple[Batch[Row], list[Ticket[Row]]]:
        """Take the next batch out; empty when nothing waits. Second: requests dropped because `now` is too late."""
        room = _Room(budget_tokens, budget_tokens if waste_tokens is None else waste_tokens)
        batch: Batch[Row] = []
        longest = 0
        expired: list[Ticket[Row]] = []
        with self._lock:
            for queue, part in self._turn(room, now, expired):
                longest = queue.fill(batch, longest, part, now, expired)
        return batch, expired

    def _turn(self, room: "_Room", now: float, expired: list[Ticket[Row]]) -> "list[tuple[_Queue[Row], _Room]]":
        """The queues that fill the next batch, in order, and the room that each may use."""
        interactive, bulk = self._queues["interactive"], self._queues["bulk"]
        if interactive.oldest(now, expired) is None or bulk.oldest(now, expired) is None:
            self._passed_over = 0
            return [(interactive, room), (bulk, room)]
        self._passed_over = (self._passed_over + 1) % BULK_TURN
        beside = _Room(room.budget_tokens // BULK_BESIDE, room.waste_tokens)
        mixed = [(interactive, _Room(room.budget_tokens, room.waste_tokens * INTERACTIVE_WASTE)), (bulk, beside)]
        if self._passed_over:
            return mixed
        return [(bulk, _Room(room.budget_tokens // 2, room.waste_tokens)), *mixed]


@dataclass(frozen=True, slots=True)
class _Room:
    """What a batch may hold: see `Limits`."""

    budget_tokens: int
    waste_tokens: int


class _Queue(Generic[Row]):
    """Waiting rows of one priority, by arrival and by length."""

    def __init__(self) -> None:
        self.waiting = 0
        self.waiting_tokens = 0
        self._arrivals: deque[Ticket[Row]] = deque()
        self._by_length: dict[int, deque[tuple[Ticket[Row], int]]] = {}
        # Bit n is set while rows of length n may wait: the next length up or down is found in one step, however many
        # rows wait.
        self._lengths = 0

    def add(self, ticket: Ticket[Row]) -> None:
        self.waiting += ticket.waiting
        self.waiting_tokens += ticket.waiting_tokens
        self._arrivals.append(ticket)
        for index, ids in enumerate(ticket.token_ids):
            bucket = self._by_length.get(len(ids))
            if bucket is None:
                bucket = self._by_length[len(ids)] = deque()
                self._lengths |= 1 << len(ids)
            bucket.append((ticket, index))

    def forget(self, ticket: Ticket[Row]) -> None:
        self.waiting -= ticket.waiting
        self.waiting_tokens -= ticket.waiting_tokens
        if not self.waiting:
            self._clear()

    def _clear(self) -> None:
        self._arrivals.clear()
        self._by_length.clear()
        self._lengths = 0

    def oldest(self, now: float, expired: list[Ticket[Row]]) -> tuple[Ticket[Row], int] | None:
        while self._arrivals:
            ticket = self._arrivals[0]
            if ticket.waiting and self._is_alive(ticket, now, expired):
                ticket.cursor = ticket.taken.index(0, ticket.cursor)
                return ticket, ticket.cursor
            if self._arrivals:
                self._arrivals.popleft()
        return None

    def fill(self, batch: Batch[Row], longest: int, room: _Room, now: float, expired: list[Ticket[Row]]) -> int:
        """Add rows to `batch`, padded to `longest` so far; the new longest."""
        if not batch:
            oldest = self.oldest(now, expired)
            if oldest is None:
                return longest
            longest = len(oldest[0].token_ids[oldest[1]])
            self._pop(batch, longest, now, expired)
        while (limit := room.budget_tokens // (len(batch) + 1)) >= longest:
            length = self._nearest(longest, len(batch), limit, room.waste_tokens)
            if length is None:
                break
            if self._pop(batch, length, now, expired):
                longest = max(longest, length)
        if not self.waiting:
            self._clear()
        return longest

    def _nearest(self, longest: int, rows: int, limit: int, waste: int) -> int | None:
        """The length, up to `limit`, whose next row adds least padding to `rows` rows padded to `longest`.

        None when there is none, or when it would add more than `waste`.
        """
        below = (self._lengths & ((2 << longest) - 1)).bit_length() - 1
        best = (longest - below, below) if below >= 0 else None
        higher = (self._lengths & ((2 << limit) - 1)) >> (longest + 1)
        if higher:
            above = longest + (higher & -higher).bit_length()
            best = min(best, ((above - longest) * rows, above)) if best else ((above - longest) * rows, above)
        return best[1] if best and best[0] <= waste else None

    def _pop(self, batch: Batch[Row], length: int, now: float, expired: list[Ticket[Row]]) -> bool:
        """Move the oldest row of `length` that is alive to `batch`; whether there was one."""
        bucket = self._by_length[length]
        found = False
        while bucket and not found:
            ticket, index = bucket.popleft()
            found = self._is_alive(ticket, now, expired)
        if found:
            batch.append((ticket, index))
            ticket.taken[index] = 1
            ticket.waiting -= 1
            ticket.waiting_tokens -= length
            self.waiting -= 1
            self.waiting_tokens -= length
        if not bucket:
            self._by_length.pop(length, None)
            self._lengths &= ~(1 << length)
        return found

    def _is_alive(self, ticket: Ticket[Row], now: float, expired: list[Ticket[Row]]) -> bool:
        if not ticket.dead and ticket.deadline is not None and ticket.deadline <= now:
            ticket.dead = True
            expired.append(ticket)
            self.forget(ticket)
        return not ticket.dead


@dataclass(slots=True, eq=False)
class _Order(Generic[Row]):
    """A batch that the engine was asked for."""

    batch: Batch[Row] = field(default_factory=list)
    """Chosen when the engine begins it."""
    begun_at: float = 0.0
    """0: not yet."""
    task: "asyncio.Task[None] | None" = None


class TokenBatcher(Generic[Row]):
    """Runs what waits through `classify`, batch by batch."""

    def __init__(
        self,
        classify: Callable[[Begin], Awaitable[Sequence[Row]]],
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """`classify` begins a batch and gives a result for each row, in order, or raises if one cannot have any."""
        self._classify = classify
        self.limits = limits or Limits()
        self._budget_tokens = 256 if self.limits.budget_tokens is None else self.limits.budget_tokens
        self._waste_tokens = 8 if self.limits.waste_tokens is None else self.limits.waste_tokens
        self._clock = clock
        self._observe = observe
        self._backlog = Backlog[Row]()
        self._orders: list[_Order[Row]] = []
        self._pump_is_due = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._tokens_per_s = 0.0
        self._full_tokens_per_s = self.limits.tokens_per_s or 0.0
        self._last_done_at = 0.0
        self.failures_in_a_row = 0
        """Rows that failed alone since a batch succeeded."""

    @property
    def waiting(self) -> int:
        """Texts that wait for the engine."""
        return self._backlog.waiting

    @property
    def waiting_tokens(self) -> int:
        """Their tokens, without padding."""
        return self._backlog.waiting_tokens

    @property
    def next_tokens(self) -> int:
        """About how many of them the next batch will hold."""
        return min(self._backlog.waiting_tokens, self._budget_tokens)

    async def submit(
        self,
        token_ids: Sequence[TokenIds],
        *,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
        timing: Timing | None = None,
    ) -> list[Row | Exception]:
        """The result of each row, in order; for a row that the engine cannot classify, the exception.

        `deadline_s` seconds from now, rows that still wait are given up. Cancelling gives up what still waits.
        `timing` is filled in.

        Raises:
            OverloadedError: too many texts wait already, or more work than can be done before the deadline.
            DeadlineExceededError: the deadline passed before all rows reached the engine.
            ShuttingDownError: after `drain`.
        """
        if not token_ids:
            return []
        self.admit(len(token_ids), priority, deadline_s)
        now = self._clock()
        ticket: Ticket[Row] = Ticket(token_ids, priority, now, None if deadline_s is None else now + deadline_s)
        ticket.answer = asyncio.get_running_loop().create_future()
        self._backlog.add(ticket)
        self._idle.clear()
        self._pump_soon()
        try:
            await ticket.answer
        except asyncio.CancelledError:
            self._backlog.drop(ticket)
            self._pump_soon()
            raise
        finally:
            if timing is not None:
                timing.admitted, timing.taken, timing.done = now, ticket.taken_at, self._clock()
        return ticket.results  # type: ignore[return-value]  # answered, so that no None is left

    async def drain(self) -> None:
        """Refuse new work and return when all that was admitted is answered."""
        self._draining = True
        await self._idle.wait()

    def admit(self, texts: int, priority: Priority, deadline_s: float | None = None) -> None:
        """Refuse, as `submit` would, before work is put into preparing `texts` texts."""
        if self._draining:
            raise ShuttingDownError("This replica is shutting down; try again.")
        waiting = self._backlog.waiting_of(priority)
        if not waiting:
            return
        limits = self.limits
        is_bulk = priority == "bulk"
        bound = limits.max_bulk_texts if is_bulk else limits.max_interactive_texts
        if waiting + texts > bound:
            excess = min((waiting + texts - bound) / waiting, 1.0) * self._backlog.waiting_tokens_of(priority)
            why = f"{waiting} texts wait already and at most {bound} may"
            raise self._overloaded(why, excess, limit=bound, is_for_all=True)
        most_s = limits.max_bulk_s if is_bulk else limits.max_interactive_s
        wait_s = most_s if deadline_s is None else min(most_s, deadline_s)
        ahead = self._backlog.waiting_tokens if is_bulk else self._backlog.waiting_tokens_of(priority)
        excess = ahead - wait_s * self._capacity
        if self._capacity and excess > 0:
            why = f"The texts that wait already need more than {wait_s:g} s"
            raise self._overloaded(why, excess, is_for_all=wait_s == most_s)

    def _overloaded(self, why: str, excess_tokens: float, **details: int) -> OverloadedError:
        """What is raised when there is room only after `excess_tokens` were classified."""
        wait_s = excess_tokens / self._capacity if self._capacity else 1.0
        message = f"{why}; try again later or with fewer texts."
        return OverloadedError(message, retry_after_s=min(max(wait_s, 0.1), 60.0), **details)

    @property
    def _capacity(self) -> float:
        """Tokens a second while a queue is worked off; 0 if not known."""
        return max(self._tokens_per_s, self._full_tokens_per_s)

    def _pump_soon(self) -> None:
        # After the callbacks that are ready now: requests that arrived together join one batch.
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        while self._may_order():
            order = _Order[Row]()
            self._orders.append(order)
            order.task = asyncio.get_running_loop().create_task(self._execute(order))
        if not self._orders and not self._backlog.waiting:
            self._idle.set()

    def _may_order(self) -> bool:
        if not self._orders:
            return self._backlog.waiting > 0
        if len(self._orders) > self.limits.ahead:
            return False
        ordered = self._budget_tokens * sum(not order.begun_at for order in self._orders)
        return self._backlog.waiting_tokens - ordered >= self.limits.ahead_tokens

    def _begin(self, order: _Order[Row], loop: asyncio.AbstractEventLoop) -> list[TokenIds]:
        """Choose what is in `order`. In the engine's thread."""
        now = self._clock()
        batch, expired = self._backlog.take(self._budget_tokens, now, self._waste_tokens)
        for ticket, _ in batch:
            ticket.taken_at = ticket.taken_at or now
        order.batch, order.begun_at = batch, now
        if expired:
            loop.call_soon_threadsafe(self._expire, expired)
        elif self._may_order():
            loop.call_soon_threadsafe(self._pump_soon)
        return _rows(batch)

    def _expire(self, tickets: list[Ticket[Row]]) -> None:
        for ticket in tickets:
            self._fail(ticket, DeadlineExceededError("The deadline passed while the texts waited for the engine."))
        self._pump_soon()

    async def _execute(self, order: _Order[Row]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._run(order, lambda: self._begin(order, loop))
        except BaseException:
            for ticket, _ in order.batch:
                self._backlog.drop(ticket)
                self._fail(ticket, ShuttingDownError("The replica stopped before the text was classified; try again."))
            raise
        finally:
            self._orders.remove(order)
            self._pump_soon()

    async def _run(self, order: _Order[Row], begin: Begin) -> None:
        try:
            rows = await self._classify(begin)
            if len(rows) != len(order.batch):
                raise EngineError(f"The engine gave {len(rows)} results for a batch of {len(order.batch)}.")
        except Exception as error:  # one row's failure must not become its neighbours'
            if not order.begun_at:
                begin()
            await self._split(order.batch, error)
            return
        if order.batch:
            self.failures_in_a_row = 0
            self._report(order)
        for (ticket, index), row in zip(order.batch, rows, strict=True):
            self._settle(ticket, index, row)

    async def _split(self, batch: Batch[Row], error: Exception) -> None:
        """Find the row that fails by halving the batch."""
        if len(batch) > 1:
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                alive = [(ticket, index) for ticket, index in half if not ticket.dead]
                if alive:
                    await self._run(_Order(alive, self._clock()), partial(_rows, alive))
            return
        self.failures_in_a_row += len(batch)
        if not isinstance(error, OvertoneError):
            error = EngineError("The engine failed on this text.")
        for ticket, index in batch:
            self._settle(ticket, index, error)

    def _settle(self, ticket: Ticket[Row], index: int, result: Row | Exception) -> None:
        ticket.results[index] = result
        ticket.unanswered -= 1
        if not ticket.unanswered and ticket.answer is not None and not ticket.answer.done():
            ticket.answer.set_result(None)

    def _fail(self, ticket: Ticket[Row], error: Exception) -> None:
        if ticket.answer is not None and not ticket.answer.done():
            ticket.answer.set_exception(error)

    def _report(self, order: _Order[Row]) -> None:
        now = self._clock()
        busy_s = now - max(order.begun_at, self._last_done_at)
        self._last_done_at = now
        lengths = [len(ids) for ids in _rows(order.batch)]
        padded = len(lengths) * max(lengths)
        if busy_s > 0:
            rate = sum(lengths) / busy_s
            self._tokens_per_s = _blended(self._tokens_per_s, rate)
            if 2 * padded >= self._budget_tokens:
                self._full_tokens_per_s = _blended(self._full_tokens_per_s, rate)
        if self._observe is not None:
            queue_s = order.begun_at - min(ticket.admitted_at for ticket, _ in order.batch)
            self._observe(BatchReport(len(lengths), sum(lengths), padded, queue_s, busy_s, self._backlog.waiting))


def _rows(batch: Batch[Row]) -> list[TokenIds]:
    return [ticket.token_ids[index] for ticket, index in batch]


def _blended(rate: float, latest: float) -> float:
    return _RATE_MEMORY * rate + (1 - _RATE_MEMORY) * latest if rate else latest
