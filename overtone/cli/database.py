"""`overtone db`: the tables of the database of this home."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape

from overtone.cli.cleanup import embedded_postgres
from overtone.cli.state import RunFolder
from overtone.db.database import Database
from overtone.db.migrate import check, upgrade
from overtone.errors import DataError, EnvironmentProblemError
from overtone.settings import Settings

_LOCK_TIMEOUT_S = 10.0

T = TypeVar("T")


def upgrade_database(settings: Settings, console: Console) -> int:
    """Bring the tables to the newest revision; 0 when that is done.

    Raises:
        OvertoneError: the database cannot be reached or upgraded.
    """
    with reachable_database(settings) as url:
        asyncio.run(upgrade(url))
    console.print("The database is up to date.")
    return 0


def check_database(settings: Settings, console: Console) -> int:
    """Say how the tables differ from what this program needs; 0 when they do not.

    Raises:
        DataError: they differ.
    """
    with reachable_database(settings) as url:
        problems = check(url)
    for problem in problems:
        console.print(f" [red]✗[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise DataError(f"The database is not as this version needs it: {len(problems)} differences.")
    console.print("The database is as this version needs it.")
    return 0


@contextmanager
def reachable_database(settings: Settings) -> Iterator[str]:
    """The address of the database of this home; an embedded one that is not up is started for the block.

    Raises:
        EnvironmentProblemError: another command is starting or stopping the stack.
    """
    if settings.database_url:
        yield settings.database_url.get_secret_value()
        return
    postgres = embedded_postgres(settings.home)
    folder = RunFolder(settings.home)
    has_lock = folder.try_lock()
    if not has_lock and postgres.is_running():
        yield postgres.url
        return
    # Without the lock, a server that runs is owned by a living `up`; with it, what runs is a leftover.
    if not has_lock and not folder.lock(_LOCK_TIMEOUT_S):
        raise EnvironmentProblemError(f"Another command is starting or stopping Overtone in {settings.home}.")
    try:
        yield postgres.start()
    finally:
        postgres.stop()
        folder.unlock()


def with_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    """What `work` returns for the database of this home, opened for it."""

    async def opened(url: str) -> T:
        db = await Database.open(url, max_size=2, application_name="overtone-cli")
        try:
            return await work(db)
        finally:
            await db.close()

    with reachable_database(settings) as url:
        return asyncio.run(opened(url))
