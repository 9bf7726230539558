"""Waits between connections, on a clock that the test turns."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.backoff import Backoff, ConnectBudget, Failure


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class NoDice(random.Random):
    """Always the low end."""

    def uniform(self, a: float, b: float) -> float:
        return a


def waits(failure: Failure, count: int) -> list[float]:
    backoff = Backoff(NoDice())
    return [backoff.next_s(failure) for _ in range(count)]


def test_network_errors_wait_in_even_steps_from_at_once() -> None:
    assert waits(Failure.NETWORK, 4) == [0, 0.25, 0.5, 0.75]
    assert waits(Failure.NETWORK, 100)[-1] == 16


def test_http_errors_double_from_five_seconds() -> None:
    assert waits(Failure.HTTP, 8) == [5, 10, 20, 40, 80, 160, 320, 320]


def test_throttling_doubles_from_a_minute() -> None:
    assert waits(Failure.THROTTLED, 6) == [60, 120, 240, 480, 960, 960]


def test_the_reset_header_is_waited_for() -> None:
    assert Backoff(NoDice()).next_s(Failure.THROTTLED, 700) == 700


def test_a_good_connection_starts_over() -> None:
    backoff = Backoff(NoDice())
    backoff.next_s(Failure.NETWORK)
    backoff.next_s(Failure.NETWORK)
    backoff.reset()
    assert backoff.next_s(Failure.NETWORK) == 0


@given(st.lists(st.sampled_from(Failure), max_size=200), st.floats(0, 5_000), st.integers())
def test_waits_stay_within_their_bounds(failures: list[Failure], at_least_s: float, seed: int) -> None:
    backoff = Backoff(random.Random(seed))
    limits = {Failure.NETWORK: 16.0, Failure.HTTP: 320.0, Failure.THROTTLED: 960.0}
    for failure in failures:
        wait_s = backoff.next_s(failure, at_least_s)
        assert at_least_s <= wait_s <= max(limits[failure], at_least_s) * 1.25


@given(st.lists(st.floats(0, 120), min_size=1, max_size=300), st.integers(2, 60))
def test_no_window_ever_holds_more_connections_than_allowed(pauses: list[float], limit: int) -> None:
    clock = Clock()
    budget = ConnectBudget(clock, limit=limit, window_s=900)
    times: list[float] = []
    for pause in pauses:
        clock.now += pause
        if budget.wait_s() <= 0:
            budget.spend()
            times.append(clock.now)
    for index, time in enumerate(times):
        assert len([later for later in times[index:] if later < time + 900]) <= limit


def test_an_empty_budget_gives_a_connection_every_so_often() -> None:
    clock = Clock()
    budget = ConnectBudget(clock, limit=50, window_s=900)
    for _ in range(25):
        assert budget.wait_s() == 0
        budget.spend()
    assert budget.wait_s() == pytest.approx(36)
    clock.now += 36.001
    assert budget.wait_s() == 0


def test_the_api_has_the_last_word_on_the_budget() -> None:
    clock = Clock()
    budget = ConnectBudget(clock)
    budget.learn(remaining=0, reset_in_s=300)
    assert budget.wait_s() == 300
    clock.now += 300
    assert budget.wait_s() == 0
    budget.learn(remaining=3, reset_in_s=300)
    assert budget.wait_s() == 0


@given(
    st.lists(st.tuples(st.floats(0, 60), st.booleans()), min_size=1, max_size=300),
    st.integers(2, 60),
)
def test_no_window_ever_holds_more_connections_however_often_the_process_dies(
    steps: list[tuple[float, bool]], limit: int
) -> None:
    clock = Clock()
    budget = ConnectBudget(clock, limit=limit, window_s=900)
    times: list[float] = []
    for pause, dies in steps:
        clock.now += pause
        if dies:
            budget = ConnectBudget(clock, limit=limit, window_s=900)
            budget.remember(clock.now - time for time in times if clock.now - time <= 900)
        if budget.wait_s() <= 0:
            budget.spend()
            times.append(clock.now)
    for index, time in enumerate(times):
        assert len([later for later in times[index:] if later < time + 900]) <= limit


def test_what_never_reached_the_api_is_given_back() -> None:
    clock = Clock()
    budget = ConnectBudget(clock, limit=2, window_s=900)
    for _ in range(5):
        assert budget.wait_s() == 0
        budget.spend()
        budget.give_back()
    budget.spend()
    assert budget.wait_s() > 0
    budget.remember([])
    assert budget.wait_s() == 0
