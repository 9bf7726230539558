"""Connections are counted over processes, and while the database is away."""

from ingest.connects import ConnectLog, Connects
from overtone.db import Database
from overtone.errors import DatabaseUnavailableError


class Clock:
    """Seconds that pass when told to."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class WaitedError(Exception):
    """Stands for a wait that the test does not sit through."""


async def refuse_to_wait(seconds: float) -> None:
    assert seconds > 0
    raise WaitedError


async def taken(connects: Connects) -> int:
    """How many requests may be made before the first wait."""
    count = 0
    while True:
        try:
            await connects.until_allowed(refuse_to_wait)
        except WaitedError:
            return count
        await connects.take()
        count += 1


async def test_the_next_process_finds_what_the_last_one_used(fresh_database: Database) -> None:
    log = ConnectLog(fresh_database, "s")
    assert await taken(Connects(10, log, clock=Clock())) == 5
    assert await taken(Connects(10, ConnectLog(fresh_database, "s"), clock=Clock())) == 0
    assert await taken(Connects(10, ConnectLog(fresh_database, "other"), clock=Clock())) == 5


async def test_what_never_reached_x_is_given_back(fresh_database: Database) -> None:
    connects = Connects(10, ConnectLog(fresh_database, "s"), clock=Clock())
    for _ in range(20):
        await connects.until_allowed(refuse_to_wait)
        await connects.give_back(await connects.take())
    assert await ConnectLog(fresh_database, "s").ages_s() == []


class AwayDatabase(Database):
    """Nothing answers, until it is back."""

    def __init__(self, real: Database) -> None:
        super().__init__(real._pool, real._address)
        self.is_away = True

    def acquire(self):  # type: ignore[no-untyped-def]
        if self.is_away:
            raise DatabaseUnavailableError
        return super().acquire()


async def test_a_database_that_is_away_holds_up_no_connection(fresh_database: Database) -> None:
    away = AwayDatabase(fresh_database)
    connects = Connects(10, ConnectLog(away, "s"), clock=Clock())
    for _ in range(3):
        await connects.until_allowed(refuse_to_wait)
        await connects.take()
    away.is_away = False
    await connects.until_allowed(refuse_to_wait)
    await connects.take()
    ages_s = await ConnectLog(fresh_database, "s").ages_s()
    assert ages_s is not None
    assert len(ages_s) == 4
    assert await taken(connects) == 1
