"""The batcher beside `@serve.batch` of Ray, with the same fake engine and the same arrivals."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from serve.batcher import Limits, TokenBatcher

# Ray Serve 2.60 defines its models in a way that pydantic calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROWS = 32

Submit = Callable[[list[int]], Awaitable[Any]]


class GatedEngine:
    """Answers a batch when its gate is open; a row with the id 13 fails the batch."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.started = asyncio.Event()
        self.gate = asyncio.Event()

    async def classify(self, rows: Sequence[list[int]]) -> list[int]:
        self.batches.append(list(rows))
        self.started.set()
        await self.gate.wait()
        if any(13 in row for row in rows):
            raise ValueError("a bad row")
        return [sum(row) for row in rows]


def ours(engine: GatedEngine) -> Submit:
    batcher: TokenBatcher[int] = TokenBatcher(
        lambda begin: engine.classify(begin()), limits=Limits(budget_tokens=10_000, ahead=0)
    )

    async def submit(row: list[int]) -> Any:
        (answer,) = await batcher.submit([row])
        if isinstance(answer, Exception):
            raise answer
        return answer

    return submit


def rays(engine: GatedEngine) -> Submit:
    from ray import serve
    from ray.serve import context
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.schema import ReplicaRank

    # `@serve.batch` asks the replica it runs in how many requests it takes at once.
    context._set_internal_replica_context(
        replica_id=ReplicaID("replica", DeploymentID("deployment")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=10 * ROWS),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )

    @serve.batch(max_batch_size=ROWS, batch_wait_timeout_s=0)
    async def classify(rows: list[list[int]]) -> list[int]:
        return await engine.classify(rows)

    return classify  # type: ignore[no-any-return]


async def _arrive_while_the_engine_is_busy(make: Callable[[GatedEngine], Submit], rows: list[list[int]]) -> Any:
    engine = GatedEngine()
    submit = make(engine)
    first = asyncio.ensure_future(submit([1]))
    await asyncio.wait_for(engine.started.wait(), timeout=10)
    waiting = []
    for row in rows:
        waiting.append(asyncio.ensure_future(submit(row)))
        for _ in range(5):
            await asyncio.sleep(0)
    engine.gate.set()
    answers = await asyncio.gather(first, *waiting, return_exceptions=True)
    return engine, answers[1:]


@pytest.mark.parametrize("make", [ours, rays])
async def test_every_row_is_answered_with_its_own_result(make: Callable[[GatedEngine], Submit]) -> None:
    rows = [[number, number] for number in range(20, 20 + ROWS)]

    _, answers = await _arrive_while_the_engine_is_busy(make, rows)

    assert answers == [2 * number for number in range(20, 20 + ROWS)]


async def test_rows_that_come_one_by_one_make_one_batch_here_and_many_there() -> None:
    rows = [[number] for number in range(20, 20 + ROWS)]

    our_engine, _ = await _arrive_while_the_engine_is_busy(ours, rows)
    rays_engine, _ = await _arrive_while_the_engine_is_busy(rays, rows)

    assert [len(batch) for batch in our_engine.batches] == [1, ROWS]
    assert len(rays_engine.batches) > 2


async def test_a_bad_row_fails_alone_here_and_its_neighbours_there() -> None:
    rows = [[20], [13], [21]]

    _, our_answers = await _arrive_while_the_engine_is_busy(ours, rows)

    engine = GatedEngine()
    engine.gate.set()
    submit = rays(engine)
    rays_answers = await asyncio.gather(*(submit(row) for row in rows), return_exceptions=True)

    assert [our_answers[0], our_answers[2]] == [20, 21]
    assert isinstance(our_answers[1], Exception)
    assert all(isinstance(answer, ValueError) for answer in rays_answers)
