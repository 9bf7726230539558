"""Choosing batches (properties of `Backlog`) and running them (`TokenBatcher` on a real event loop)."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.errors import DeadlineExceededError, EngineError, OverloadedError, ShuttingDownError
from serve.batcher import (
    BULK_BESIDE,
    BULK_TURN,
    Backlog,
    Batch,
    BatchReport,
    Begin,
    Limits,
    Priority,
    Ticket,
    Timing,
    TokenBatcher,
    TokenIds,
)

POISON = -1
PRIORITIES: tuple[Priority, ...] = ("interactive", "bulk")

requests = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.sampled_from(PRIORITIES)),
    min_size=1,
    max_size=20,
)
rows_to_classify = st.lists(
    st.one_of(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.just([POISON])), max_size=12
)
budgets = st.integers(1, 200)
# A machine at work on other things takes its time now and then.
properties = settings(max_examples=60, deadline=None)


def ticket(lengths: Sequence[int], priority: Priority = "interactive", deadline: float | None = None) -> Ticket[int]:
    return Ticket([[1] * length for length in lengths], priority, deadline=deadline)


def backlog_of(*tickets: Ticket[int]) -> Backlog[int]:
    backlog = Backlog[int]()
    for item in tickets:
        backlog.add(item)
    return backlog


def lengths_of(batch: Batch[int]) -> list[int]:
    return [len(item.token_ids[index]) for item, index in batch]


def take_all(backlog: Backlog[int], budget: int, now: float = 0.0) -> list[Batch[int]]:
    batches = []
    while backlog.waiting:
        batch, _ = backlog.take(budget, now)
        if batch:
            batches.append(batch)
    return batches


# --- the choice


@properties
@given(requests, budgets)
def test_every_row_is_taken_exactly_once(asked: list[tuple[list[int], Priority]], budget: int) -> None:
    tickets = [ticket(lengths, priority) for lengths, priority in asked]
    taken = Counter((id(item), index) for batch in take_all(backlog_of(*tickets), budget) for item, index in batch)

    assert taken == Counter((id(item), index) for item in tickets for index in range(len(item.token_ids)))


@properties
@given(requests, budgets)
def test_no_batch_is_over_budget_but_a_single_row(asked: list[tuple[list[int], Priority]], budget: int) -> None:
    for batch in take_all(backlog_of(*(ticket(*request) for request in asked)), budget):
        assert len(batch) == 1 or len(batch) * max(lengths_of(batch)) <= budget


@properties
@given(requests, budgets)
def test_what_waits_is_counted(asked: list[tuple[list[int], Priority]], budget: int) -> None:
    backlog = backlog_of(*(ticket(*request) for request in asked))
    left = Counter({"texts": backlog.waiting, "tokens": backlog.waiting_tokens})
    assert left == {"texts": sum(len(r) for r, _ in asked), "tokens": sum(sum(r) for r, _ in asked)}

    for _ in range(3):
        batch, _ = backlog.take(budget, 0.0)
        left -= Counter({"texts": len(batch), "tokens": sum(lengths_of(batch))})
        assert Counter({"texts": backlog.waiting, "tokens": backlog.waiting_tokens}) == left


@properties
@given(requests, budgets)
def test_the_oldest_row_of_its_priority_is_in_each_batch(asked: list[tuple[list[int], Priority]], budget: int) -> None:
    tickets = [ticket(*request) for request in asked]
    backlog = backlog_of(*tickets)
    left = [(item, index) for item in tickets for index in range(len(item.token_ids))]
    while left:
        oldest = {priority: next((row for row in left if row[0].priority == priority), None) for priority in PRIORITIES}
        batch, _ = backlog.take(budget, 0.0)
        assert batch[0] in oldest.values()
        left = [row for row in left if row not in batch]


@properties
@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), budgets, st.data())
def test_bulk_never_starves_behind_interactive_work_that_never_ends(
    bulk: list[int], budget: int, data: st.DataObject
) -> None:
    waiting = ticket(bulk, "bulk")
    backlog = backlog_of(waiting)
    for _ in range(len(bulk) * BULK_TURN):
        backlog.add(ticket(data.draw(st.lists(st.integers(1, 40), min_size=20, max_size=20))))
        backlog.take(budget, 0.0)

    assert not waiting.waiting


@properties
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), budgets)
def test_a_row_is_passed_over_by_no_more_batches_than_rows_came_before(lengths: list[int], budget: int) -> None:
    batches = take_all(backlog_of(ticket(lengths)), budget)
    for number, batch in enumerate(batches):
        assert all(number <= index for _, index in batch)


@properties
@given(requests, st.integers(0, 19), budgets)
def test_a_dropped_request_is_never_taken(asked: list[tuple[list[int], Priority]], which: int, budget: int) -> None:
    tickets = [ticket(*request) for request in asked]
    backlog = backlog_of(*tickets)
    dropped = tickets[which % len(tickets)]
    backlog.take(budget, 0.0)
    before = dropped.waiting
    backlog.drop(dropped)
    rest = [row for batch in take_all(backlog, budget) for row in batch]

    assert dropped not in {item for item, _ in rest}
    assert dropped.waiting == before
    assert backlog.waiting == backlog.waiting_tokens == 0


def test_all_that_fits_is_taken() -> None:
    [batch] = take_all(backlog_of(ticket([3, 9, 1]), ticket([5])), budget=36)

    assert sorted(lengths_of(batch)) == [1, 3, 5, 9]


def test_rows_of_like_length_go_together() -> None:
    batches = take_all(backlog_of(ticket([30, 5, 29, 6, 31, 4])), budget=93)

    assert [sorted(lengths_of(batch)) for batch in batches] == [[29, 30, 31], [4, 5, 6]]


def test_a_row_that_would_add_much_padding_waits_for_its_like() -> None:
    backlog = backlog_of(ticket([30, 10, 28, 36, 50, 9, 22]))
    batches = []
    while backlog.waiting:
        batch, _ = backlog.take(500, 0.0, waste_tokens=8)
        batches.append(lengths_of(batch))

    assert batches == [[30, 28, 22], [10, 9], [36], [50]]


@pytest.mark.parametrize(("interactive", "bulk"), [(1, 4), (3, 2), (7, 0)])
def test_interactive_rows_go_first_and_bulk_fills_up_a_quarter(interactive: int, bulk: int) -> None:
    backlog = backlog_of(ticket([10] * 100, "bulk"), ticket([10] * interactive))
    batch, _ = backlog.take(50 * BULK_BESIDE, 0.0)
    after, _ = backlog.take(50 * BULK_BESIDE, 0.0)

    assert [item.priority for item, _ in batch] == ["interactive"] * interactive + ["bulk"] * bulk
    assert [item.priority for item, _ in after] == ["bulk"] * 5 * BULK_BESIDE


def test_rows_past_their_deadline_are_given_up_when_met() -> None:
    late, early = ticket([5, 5, 9], deadline=1.0), ticket([5], deadline=3.0)
    batch, expired = backlog_of(late, early).take(50, now=1.0)

    assert expired == [late]
    assert [item for item, _ in batch] == [early]


def test_one_row_longer_than_the_budget_runs_alone() -> None:
    assert [lengths_of(batch) for batch in take_all(backlog_of(ticket([500, 1])), budget=100)] == [[500], [1]]


# --- the running


class Engine:
    """Classifies a row as the sum of its ids, when told to; fails on a batch with `POISON` in it."""

    def __init__(self) -> None:
        self.batches: list[list[TokenIds]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def classify(self, begin: Begin) -> list[int]:
        token_ids = begin()
        if token_ids:
            self.batches.append(token_ids)
        await self.gate.wait()
        return scored(token_ids)


def scored(token_ids: list[TokenIds]) -> list[int]:
    if any(POISON in ids for ids in token_ids):
        raise EngineError("poisoned")
    return [sum(ids) for ids in token_ids]


class ThreadEngine:
    """The same in a thread, one batch after the other."""

    def __init__(self) -> None:
        self.batches: list[list[TokenIds]] = []
        self.gate = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    async def classify(self, begin: Begin) -> list[int]:
        def run() -> list[int]:
            self.batches.append(begin())
            assert self.gate.wait(10)
            return scored(self.batches[-1])

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def close(self) -> None:
        self._thread.shutdown()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (what is waited for is state of the code under test)
            await asyncio.sleep(0)


@properties
@given(
    st.lists(
        st.tuples(
            rows_to_classify,
            st.sampled_from(PRIORITIES),
        ),
        max_size=12,
    ),
    st.integers(1, 100),
    st.integers(0, 2),
)
def test_every_row_gets_its_own_result_whatever_its_neighbours_do(
    asked: list[tuple[list[TokenIds], Priority]], budget: int, ahead: int
) -> None:
    async def run() -> list[list[int | Exception]]:
        batcher = TokenBatcher[int](Engine().classify, limits=Limits(budget_tokens=budget, ahead=ahead))
        return await asyncio.gather(*(batcher.submit(rows, priority=priority) for rows, priority in asked))

    for (rows, _), results in zip(asked, asyncio.run(run()), strict=True):
        for row, result in zip(rows, results, strict=True):
            assert isinstance(result, EngineError) if POISON in row else result == sum(row)


@properties
@given(
    st.lists(
        st.tuples(
            rows_to_classify,
            st.sampled_from(PRIORITIES),
            st.booleans(),
        ),
        max_size=12,
    ),
    st.integers(1, 100),
)
def test_every_row_gets_its_own_result_from_a_thread_that_chooses_while_requests_come_and_go(
    asked: list[tuple[list[TokenIds], Priority, bool]], budget: int
) -> None:
    engine = ThreadEngine()
    engine.gate.set()

    async def run() -> list[Any]:
        batcher = TokenBatcher[int](engine.classify, limits=Limits(budget_tokens=budget, ahead_tokens=1))
        tasks = []
        for rows, priority, leaves in asked:
            tasks.append(asyncio.create_task(batcher.submit(rows, priority=priority)))
            await asyncio.sleep(0)
            if leaves:
                tasks[-1].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(batcher.drain(), 10)
        assert batcher.waiting == batcher.waiting_tokens == 0
        return answers

    for (rows, _, leaves), results in zip(asked, asyncio.run(run()), strict=True):
        assert leaves or not isinstance(results, BaseException)
        if not isinstance(results, BaseException):
            for row, result in zip(rows, results, strict=True):
                assert isinstance(result, EngineError) if POISON in row else result == sum(row)
    engine.close()


async def test_requests_that_arrive_together_join_one_batch() -> None:
    engine = Engine()
    batcher = TokenBatcher[int](engine.classify)
    await asyncio.gather(*(batcher.submit([[number]]) for number in range(5)))

    assert len(engine.batches) == 1


async def test_what_arrives_while_the_engine_works_is_the_next_batch() -> None:
    engine = Engine()
    engine.gate.clear()
    batcher = TokenBatcher[int](engine.classify)
    waiting = [asyncio.create_task(batcher.submit([[1]]))]
    await until(lambda: engine.batches)
    waiting += [asyncio.create_task(batcher.submit([[number]])) for number in range(2, 8)]
    await until(lambda: batcher.waiting == 6)
    engine.gate.set()
    await asyncio.gather(*waiting)

    assert [len(batch) for batch in engine.batches] == [1, 6]


@pytest.mark.parametrize(("ahead", "ahead_tokens", "expected"), [(0, 10, 1), (1, 10, 2), (1, 25, 2), (1, 26, 1)])
async def test_a_batch_is_chosen_ahead_only_under_backlog(ahead: int, ahead_tokens: int, expected: int) -> None:
    engine = Engine()
    engine.gate.clear()
    batcher = TokenBatcher[int](
        engine.classify, limits=Limits(budget_tokens=10, ahead=ahead, ahead_tokens=ahead_tokens)
    )
    task = asyncio.create_task(batcher.submit([[1] * 5] * 7))
    await until(lambda: len(engine.batches) == expected)
    for _ in range(5):
        await asyncio.sleep(0)

    assert len(engine.batches) == expected
    engine.gate.set()
    await task


async def test_a_full_queue_refuses_and_says_for_how_long() -> None:
    engine, clock = Engine(), Clock()
    batcher = TokenBatcher[int](
        engine.classify,
        limits=Limits(budget_tokens=4, max_interactive_texts=10, max_interactive_s=60.0, ahead=0),
        clock=clock,
    )
    engine.gate.clear()
    first = asyncio.create_task(batcher.submit([[1]] * 4))
    await until(lambda: engine.batches)
    clock.now += 2.0
    engine.gate.set()
    await first
    engine.gate.clear()
    tasks = [asyncio.create_task(batcher.submit([[1]] * 4))]
    await until(lambda: len(engine.batches) == 2)
    tasks += [asyncio.create_task(batcher.submit([[1]] * 4)) for _ in range(2)]
    await until(lambda: batcher.waiting == 8)

    with pytest.raises(OverloadedError) as caught:
        await batcher.submit([[1]] * 6)
    assert caught.value.is_for_all
    assert caught.value.retry_after_s == pytest.approx(4 / 2.0)  # 4 texts too many, 2 texts a second
    engine.gate.set()
    await asyncio.gather(*tasks)


async def rated(engine: Engine, clock: Clock, **limits: float) -> TokenBatcher[int]:
    """A batcher that has measured 2 tokens a second."""
    settings: dict[str, Any] = {"budget_tokens": 4, "ahead": 0, **limits}
    batcher = TokenBatcher[int](engine.classify, limits=Limits(**settings), clock=clock)
    engine.gate.clear()
    first = asyncio.create_task(batcher.submit([[1]] * 4))
    await until(lambda: engine.batches)
    clock.now += 2.0
    engine.gate.set()
    await first
    engine.gate.clear()
    return batcher


async def test_an_interactive_text_is_in_the_batch_that_the_engine_begins_next() -> None:
    engine = ThreadEngine()
    batcher = TokenBatcher[int](engine.classify, limits=Limits(budget_tokens=4, ahead=1, ahead_tokens=1))
    bulk = asyncio.create_task(batcher.submit([[1]] * 40, priority="bulk"))
    await until(lambda: engine.batches)
    for _ in range(5):  # turns of the event loop, in which the batch after it is ordered
        await asyncio.sleep(0)
    one = asyncio.create_task(batcher.submit([[5]]))
    await until(lambda: batcher.waiting == 37)
    engine.gate.set()

    assert await one == [5]
    assert await bulk == [1] * 40
    assert [len(batch) for batch in engine.batches if batch][:2] == [4, 1]
    assert [5] in engine.batches[1]
    engine.close()


@pytest.mark.parametrize(
    ("priority", "deadline_s", "retry_after_s"),
    [("interactive", None, None), ("bulk", None, 2.0), ("interactive", 3.0, 1.0), ("bulk", 3.0, 3.0)],
)
async def test_work_that_cannot_be_done_in_time_is_refused_at_once(
    priority: Priority, deadline_s: float | None, retry_after_s: float | None
) -> None:
    engine = Engine()
    batcher = await rated(engine, Clock(), max_interactive_s=4.0, max_bulk_s=4.0)
    tasks = [asyncio.create_task(batcher.submit([[1]] * 4))]
    await until(lambda: len(engine.batches) == 2)
    tasks += [asyncio.create_task(batcher.submit([[1] * 4] * 2))]
    tasks += [asyncio.create_task(batcher.submit([[1] * 4], priority="bulk"))]
    await until(lambda: batcher.waiting_tokens == 12)

    if retry_after_s is None:
        batcher.admit(1, priority, deadline_s)
    else:
        with pytest.raises(OverloadedError) as caught:
            await batcher.submit([[1]], priority=priority, deadline_s=deadline_s)
        assert caught.value.retry_after_s == pytest.approx(retry_after_s)
        # A request that could wait longer may still be taken.
        assert caught.value.is_for_all == (deadline_s is None)
    assert len(engine.batches) == 2
    engine.gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(("tokens_per_s", "is_refused"), [(None, True), (4.0, False)])
async def test_single_texts_do_not_tell_how_long_a_queue_takes(tokens_per_s: float | None, is_refused: bool) -> None:
    engine, clock = Engine(), Clock()
    limits = Limits(budget_tokens=8, ahead=0, max_bulk_s=4.0, tokens_per_s=tokens_per_s)
    batcher = TokenBatcher[int](engine.classify, limits=limits, clock=clock)
    engine.gate.clear()
    tasks = [asyncio.create_task(batcher.submit([[1]]))]
    await until(lambda: engine.batches)
    clock.now += 2.0  # half a token a second
    engine.gate.set()
    await tasks[0]
    engine.gate.clear()
    for number in (1, 2):
        tasks.append(asyncio.create_task(batcher.submit([[1] * 8], priority="bulk")))
        await until(lambda number=number: len(engine.batches) == 2 and batcher.waiting == number - 1)

    if is_refused:
        with pytest.raises(OverloadedError):
            batcher.admit(1, "bulk")
    else:
        batcher.admit(1, "bulk")
    engine.gate.set()
    await asyncio.gather(*tasks)


async def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    batcher = TokenBatcher[int](Engine().classify, limits=Limits(max_interactive_texts=2))

    assert await batcher.submit([[1]] * 5) == [1] * 5


async def test_bulk_work_does_not_take_the_room_of_interactive_work() -> None:
    engine = Engine()
    engine.gate.clear()
    batcher = TokenBatcher[int](engine.classify, limits=Limits(max_interactive_texts=1, max_bulk_texts=5))
    bulk = asyncio.create_task(batcher.submit([[1] * 200] * 5, priority="bulk"))
    await until(lambda: engine.batches)
    one = asyncio.create_task(batcher.submit([[2]]))
    await until(lambda: batcher.waiting >= 1)
    engine.gate.set()

    assert await one == [2]
    assert await bulk == [200] * 5


async def test_rows_that_wait_past_the_deadline_cost_nothing() -> None:
    engine, clock = Engine(), Clock()
    engine.gate.clear()
    batcher = TokenBatcher[int](engine.classify, limits=Limits(budget_tokens=1, ahead=0), clock=clock)
    first = asyncio.create_task(batcher.submit([[1]]))
    await until(lambda: engine.batches)
    late = asyncio.create_task(batcher.submit([[2]], deadline_s=0.5))
    await until(lambda: batcher.waiting == 1)
    clock.now += 1.0
    engine.gate.set()

    with pytest.raises(DeadlineExceededError):
        await late
    assert await first == [1]
    assert engine.batches == [[[1]]]


async def test_cancelled_rows_cost_nothing() -> None:
    engine = Engine()
    engine.gate.clear()
    batcher = TokenBatcher[int](engine.classify, limits=Limits(budget_tokens=1, ahead=0))
    first = asyncio.create_task(batcher.submit([[1]]))
    await until(lambda: engine.batches)
    given_up = asyncio.create_task(batcher.submit([[2]] * 50))
    await until(lambda: batcher.waiting == 50)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    engine.gate.set()

    assert await first == [1]
    assert await batcher.submit([[3]]) == [3]
    assert engine.batches == [[[1]], [[3]]]


async def test_a_foreign_exception_is_not_shown() -> None:
    async def classify(begin: Begin) -> list[int]:
        raise ZeroDivisionError("secret")

    [result] = await TokenBatcher[int](classify).submit([[1]])

    assert isinstance(result, EngineError)
    assert "secret" not in str(result)


async def test_a_wrong_number_of_results_is_an_engine_error() -> None:
    async def classify(begin: Begin) -> list[int]:
        begin()
        return []

    [result] = await TokenBatcher[int](classify).submit([[1]])

    assert isinstance(result, EngineError)


async def test_failures_in_a_row_are_counted_until_one_works() -> None:
    batcher = TokenBatcher[int](Engine().classify)
    await batcher.submit([[POISON], [POISON]])
    assert batcher.failures_in_a_row == 2

    await batcher.submit([[1]])
    assert batcher.failures_in_a_row == 0


async def test_draining_answers_what_was_taken_and_refuses_the_rest() -> None:
    engine = Engine()
    engine.gate.clear()
    batcher = TokenBatcher[int](engine.classify, limits=Limits(budget_tokens=2))
    taken = asyncio.create_task(batcher.submit([[1]] * 9))
    await until(lambda: engine.batches)
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDownError):
        await batcher.submit([[1]])
    assert not draining.done()
    engine.gate.set()

    assert await taken == [1] * 9
    await asyncio.wait_for(draining, 5)


async def test_an_idle_batcher_drains_at_once() -> None:
    await asyncio.wait_for(TokenBatcher[int](Engine().classify).drain(), 1)


async def test_reports_tell_texts_tokens_and_padding() -> None:
    reports: list[BatchReport] = []
    batcher = TokenBatcher[int](Engine().classify, observe=reports.append, clock=Clock())
    await batcher.submit([[1] * 3, [1] * 5])

    assert reports == [BatchReport(texts=2, tokens=8, padded_tokens=10, queue_s=0.0, engine_s=0.0, waiting=0)]


async def test_nothing_asked_is_nothing_answered() -> None:
    assert await TokenBatcher[int](Engine().classify).submit([]) == []


async def test_the_marks_a_request_passes_are_written_down() -> None:
    now = 100.0

    async def classify(begin: Begin) -> list[int]:
        nonlocal now
        rows = begin()
        now += 2.0
        return [len(row) for row in rows]

    batcher: TokenBatcher[int] = TokenBatcher(classify, clock=lambda: now)
    timing = Timing(started=99.5)
    assert await batcher.submit([[1, 2]], timing=timing) == [2]

    assert timing.stages() == [("tokenise", 99.5, 100.0), ("queue", 100.0, 100.0), ("engine", 100.0, 102.0)]
    assert Timing(started=1.0, admitted=2.0).stages() == [("tokenise", 1.0, 2.0)]
