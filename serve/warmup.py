"""How large batches should be on this machine, found by running the engine a few times before it serves.

A batch costs about `fixed + per_token * padded tokens`. The fixed part, counted in tokens, says how much padding a
further row may add before a batch of its own is cheaper: about ten tokens on a CPU, hundreds on a GPU. And a batch need
only be so large that the fixed part is a small share of it, because rows wait longer in larger ones. That larger ones
are faster is tried before it is believed: on a CPU they fall out of the cache, and what disturbs the measuring looks
like a fixed part.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from overtone.engine import Engine
from overtone.shapes import MAX_BATCH_TOKENS
from serve.batcher import Limits

_ROW_TOKENS = 16
_ROWS = (1, 2, 4, 8, 16, 32)
_PASSES = 2
_FEWEST_RUNS, _MOST_RUNS = 3, 8
_SIZE_S = 0.05
"""Time for one size of batch in a pass: a promotion waits for all of this, on every replica in turn."""
_FIXED_SHARE = 0.04
# The least is what suits a quiet processor: a start beside other work measures badly, and too little costs more than
# too much.
MIN_BUDGET_TOKENS, MAX_BUDGET_TOKENS = 256, MAX_BATCH_TOKENS
MIN_WASTE_TOKENS, MAX_WASTE_TOKENS = 8, 1024


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch costs: `fixed_s + token_s * padded tokens` seconds."""

    fixed_s: float
    token_s: float

    @property
    def waste_tokens(self) -> int:
        """Padding that costs as much as one further batch."""
        return round(min(max(self._fixed_tokens, MIN_WASTE_TOKENS), MAX_WASTE_TOKENS))

    @property
    def budget_tokens(self) -> int:
        """The smallest batch of which the fixed part is 4 %, rounded up to 64 tokens."""
        wanted = self._fixed_tokens * (1 / _FIXED_SHARE - 1)
        return int(min(max(-(-wanted // 64) * 64, MIN_BUDGET_TOKENS), MAX_BUDGET_TOKENS))

    def tokens_per_s(self, padded_tokens: int) -> float:
        """In batches of so many tokens."""
        return padded_tokens / (self.fixed_s + self.token_s * padded_tokens)

    @property
    def _fixed_tokens(self) -> float:
        return self.fixed_s / self.token_s


def measure_batch_cost(engine: Engine, clock: Callable[[], float] = time.perf_counter) -> BatchCost:
    """Run `engine` on batches of several sizes, for half a second to a second on a CPU.

    Raises:
        EngineError: see `Engine.classify`.
    """
    seconds = _quickest(engine, _ROWS, clock)
    return fit([(rows * _ROW_TOKENS, taken) for rows, taken in seconds.items()])


def try_budget(engine: Engine, most_tokens: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The smallest budget up to `most_tokens` of which twice the size is less than 4 % faster a token on `engine`.

    Raises:
        EngineError: see `Engine.classify`.
    """
    budget = MIN_BUDGET_TOKENS
    while 2 * budget <= most_tokens:
        rows = budget // _ROW_TOKENS
        seconds = _quickest(engine, (rows, 2 * rows), clock)
        if 2 * seconds[rows] < (1 + _FIXED_SHARE) * seconds[2 * rows]:
            break
        budget *= 2
    return budget


def fitted(limits: Limits, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> Limits:
    """`limits` with what is unset in them measured on `engine`.

    Raises:
        EngineError: see `Engine.classify`.
    """
    if limits.budget_tokens is not None and limits.waste_tokens is not None:
        return limits
    cost = measure_batch_cost(engine, clock)
    budget = try_budget(engine, cost.budget_tokens, clock) if limits.budget_tokens is None else limits.budget_tokens
    waste = cost.waste_tokens if limits.waste_tokens is None else limits.waste_tokens
    rate = cost.tokens_per_s(budget) if limits.tokens_per_s is None else limits.tokens_per_s
    return replace(limits, budget_tokens=budget, waste_tokens=waste, tokens_per_s=rate)


def fit(samples: Sequence[tuple[int, float]]) -> BatchCost:
    """The line through `samples` of (padded tokens, seconds), each weighing by its relative error."""
    tokens, seconds = np.array(samples, dtype=np.float64).T
    seconds = np.maximum(seconds, 1e-9)
    columns = np.stack([np.ones_like(tokens), tokens], axis=1) / seconds[:, None]
    (fixed_s, token_s), *_ = np.linalg.lstsq(columns, np.ones_like(tokens), rcond=None)
    return BatchCost(max(float(fixed_s), 0.0), max(float(token_s), 1e-12))


def _quickest(engine: Engine, sizes: Sequence[int], clock: Callable[[], float]) -> dict[int, float]:
    """Seconds of the quickest of several runs by rows: whatever else the machine does can only make one slower.

    In two passes: what disturbs all runs of a size in one of them is seldom there in the other.
    """
    quickest = dict.fromkeys(sizes, math.inf)
    for _ in range(_PASSES):
        for rows in sizes:
            batch = [[1] * _ROW_TOKENS] * rows
            runs: list[float] = []
            while len(runs) < _FEWEST_RUNS or (len(runs) < _MOST_RUNS and sum(runs) < _SIZE_S):
                started = clock()
                engine.classify(batch)
                runs.append(clock() - started)
            quickest[rows] = min(quickest[rows], *runs)
    return quickest
