"""Waiting for what only time or another part of the system can bring."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from overtone.errors import DatabaseUnavailableError, OvertoneError

_FIRST_WAIT_S = 0.1
_MAX_WAIT_S = 1.0

T = TypeVar("T")


async def until_it_works(call: Callable[[], Awaitable[T]], note: Callable[[OvertoneError], None]) -> T:
    """The result of `call`, repeated with growing waits for as long as the database is away."""
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return await call()
        except DatabaseUnavailableError as error:
            note(error)
            await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
            wait_s = min(wait_s * 2, _MAX_WAIT_S)


async def until_true(condition: Callable[[], bool], *, every_s: float = 0.02) -> None:
    """Return once `condition` holds."""
    while not condition():  # noqa: ASYNC110  it spans several queues and sets, which share no event
        await asyncio.sleep(every_s)
