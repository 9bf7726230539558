"""Batch sizes found by measuring."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.engine import FakeEngine, Probabilities
from serve.batcher import Limits
from serve.warmup import (
    MAX_BUDGET_TOKENS,
    MAX_WASTE_TOKENS,
    MIN_BUDGET_TOKENS,
    MIN_WASTE_TOKENS,
    BatchCost,
    fit,
    fitted,
    measure_batch_cost,
    try_budget,
)


class TimedEngine(FakeEngine):
    """Moves a clock on by what a batch costs."""

    def __init__(self, cost: BatchCost) -> None:
        super().__init__()
        self.now = 0.0
        self._cost = cost

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        self.now += self._cost.fixed_s + self._cost.token_s * len(token_ids) * max(map(len, token_ids))
        return super().classify(token_ids)


@given(fixed_s=st.floats(1e-6, 1e-1), token_s=st.floats(1e-7, 1e-3))
def test_a_line_is_found_again(fixed_s: float, token_s: float) -> None:
    engine = TimedEngine(BatchCost(fixed_s, token_s))

    found = measure_batch_cost(engine, clock=lambda: engine.now)

    seconds = fixed_s + token_s * 256
    assert found.fixed_s + found.token_s * 256 == pytest.approx(seconds, rel=1e-3)


def test_a_processor_gets_small_batches_and_a_gpu_large_ones() -> None:
    processor = BatchCost(fixed_s=0.0004, token_s=0.00004)
    gpu = BatchCost(fixed_s=0.0015, token_s=0.0000012)

    assert (processor.waste_tokens, processor.budget_tokens) == (10, 256)
    assert gpu.waste_tokens == 1024
    assert gpu.budget_tokens == MAX_BUDGET_TOKENS


@pytest.mark.parametrize(
    ("cost", "budget_tokens"),
    [(BatchCost(fixed_s=0.0004, token_s=0.00004), 256), (BatchCost(fixed_s=0.0015, token_s=0.0000012), 16_384)],
)
def test_large_batches_are_taken_where_they_are_faster(cost: BatchCost, budget_tokens: int) -> None:
    engine = TimedEngine(cost)

    assert try_budget(engine, MAX_BUDGET_TOKENS, clock=lambda: engine.now) == budget_tokens


class CachedEngine(TimedEngine):
    """Takes twice as long for what a batch has beyond `cache` tokens."""

    def __init__(self, cost: BatchCost, cache: int) -> None:
        super().__init__(cost)
        self._cache = cache

    def classify(self, token_ids: list[list[int]]) -> Probabilities:
        beyond = max(len(token_ids) * len(token_ids[0]) - self._cache, 0)
        self.now += self._cost.token_s * beyond
        return super().classify(token_ids)


@pytest.mark.parametrize("cache", [256, 1024])
def test_a_batch_is_no_larger_than_the_cache(cache: int) -> None:
    engine = CachedEngine(BatchCost(fixed_s=0.004, token_s=0.00002), cache)

    assert fitted(Limits(), engine, clock=lambda: engine.now).budget_tokens == cache


def test_what_disturbs_all_runs_of_a_size_once_does_not_make_batches_large() -> None:
    class DisturbedEngine(TimedEngine):
        calls = 0

        def classify(self, token_ids: list[list[int]]) -> Probabilities:
            self.calls += 1
            self.now += 0.02 if self.calls <= 8 else 0.0
            return super().classify(token_ids)

    engine = DisturbedEngine(BatchCost(fixed_s=0.0004, token_s=0.00004))
    cost = measure_batch_cost(engine, clock=lambda: engine.now)

    assert (cost.waste_tokens, cost.budget_tokens) == (10, 256)


@given(
    st.lists(
        st.tuples(st.integers(1, 10_000), st.floats(0, 10, allow_subnormal=False)),
        min_size=2,
        max_size=8,
        unique_by=lambda s: s[0],
    )
)
def test_whatever_was_measured_the_limits_are_usable(samples: list[tuple[int, float]]) -> None:
    cost = fit(samples)

    assert MIN_WASTE_TOKENS <= cost.waste_tokens <= MAX_WASTE_TOKENS
    assert MIN_BUDGET_TOKENS <= cost.budget_tokens <= MAX_BUDGET_TOKENS


def test_only_what_is_unset_is_measured() -> None:
    engine = TimedEngine(BatchCost(0.0, 1.0))

    given = Limits(budget_tokens=100, waste_tokens=3)
    assert fitted(given, engine) is given
    assert engine.now == 0.0
    assert fitted(Limits(budget_tokens=100), engine).budget_tokens == 100
    assert fitted(Limits(budget_tokens=100, max_bulk_texts=7), engine).max_bulk_texts == 7
    measured = fitted(Limits(), FakeEngine())
    assert measured.budget_tokens is not None
    assert measured.waste_tokens is not None
