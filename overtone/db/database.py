"""A bounded pool of connections to PostgreSQL, and what its failures mean."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, TypeAlias, cast

import asyncpg

from overtone import metrics
from overtone.errors import ConfigurationError, DatabaseUnavailableError

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Renew: TypeAlias = Callable[[], Awaitable[str]]
"""Reads the address again, whose user or password the server has just refused."""

_ACQUIRE_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 60.0
_SILENCE_S = 20
"""How long a server on the network may leave bytes unacknowledged. The system's limit is a quarter of an hour, and a
query on a connection that nothing comes through cannot be given up before."""

_REFUSED = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.exceptions.ClientConfigurationError,
)
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,
)


class Database:
    """Connections to one PostgreSQL database.

    Connections that broke are replaced when they are next asked for, so a server that restarts needs no new
    `Database`. What was under way when it broke raises `DatabaseUnavailableError` and is not repeated here: every
    write of this package may be repeated by the caller without effect on what is already stored.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", address: "Address") -> None:
        self._pool = pool
        self._address = address
        self.known_months: set[int] = set()
        """Partitions seen to exist; kept by `overtone.db.partitions`."""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        max_size: int = 8,
        application_name: str = "overtone",
        renew: Renew | None = None,
        patience_s: float | None = None,
    ) -> Self:
        """Connect to `url` with at most `max_size` connections.

        `renew` is asked for another address when the server refuses the user or password of a new connection. With
        `patience_s` the server ends a transaction in which it hears nothing for so long: a process that was paused or
        cut off in the middle of one keeps its locks no longer than that.

        Raises:
            ConfigurationError: the address is malformed, or the server refuses its user, password or database.
            DatabaseUnavailableError: nothing answers there now.
        """
        address = Address(url, renew)
        settings = {"application_name": application_name}
        if patience_s is not None:
            settings["idle_in_transaction_session_timeout"] = str(round(patience_s * 1000))
        with connection_errors():
            pool = await asyncpg.create_pool(
                connect=address.connect,
                min_size=1,
                max_size=max_size,
                timeout=_ACQUIRE_TIMEOUT_S,
                command_timeout=_COMMAND_TIMEOUT_S,
                init=watch_silence,
                server_settings=settings,
            )
        database = cls(pool, address)
        database._measure()
        return database

    async def close(self) -> None:
        """Close every connection; those still at work after five seconds are cut."""
        try:
            async with asyncio.timeout(5.0):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()
        for state in ("in_use", "idle"):
            metrics.DB_POOL.labels(state).set(0)

    async def move_to(self, url: str) -> None:
        """Use `url` from now on. What is under way ends on the connection that it has.

        Raises:
            ConfigurationError, DatabaseUnavailableError: no connection can be made there; nothing has changed.
        """
        with connection_errors():
            connection = await asyncpg.connect(asyncpg_dsn(url), timeout=_ACQUIRE_TIMEOUT_S)
            await connection.close(timeout=_ACQUIRE_TIMEOUT_S)
        self._address.url = url
        await self._pool.expire_connections()

    async def ping(self) -> None:
        """Raise `DatabaseUnavailableError` unless the server answers."""
        async with self.acquire() as connection:
            await connection.fetchval("SELECT 1", timeout=5.0)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """Lend a connection outside any transaction.

        Raises:
            DatabaseUnavailableError: no connection came free in time, or it broke while lent.
        """
        with translated_errors():
            async with self._pool.acquire(timeout=_ACQUIRE_TIMEOUT_S) as proxy:
                self._measure()
                yield cast(Connection, proxy)
        self._measure()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lend a connection inside a transaction, which commits unless the block raises."""
        async with self.acquire() as connection, connection.transaction():
            yield connection

    def _measure(self) -> None:
        idle = self._pool.get_idle_size()
        metrics.DB_POOL.labels("idle").set(idle)
        metrics.DB_POOL.labels("in_use").set(self._pool.get_size() - idle)


async def watch_silence(connection: Connection) -> None:
    """Have the system break `connection` when a network between here and the server swallows everything."""
    transport = getattr(connection, "_transport", None)
    found = transport.get_extra_info("socket") if transport is not None else None
    if found is None or found.family == getattr(socket, "AF_UNIX", None):
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", _SILENCE_S * 1000),
        ("TCP_KEEPIDLE", _SILENCE_S // 2),
        ("TCP_KEEPINTVL", _SILENCE_S // 4),
        ("TCP_KEEPCNT", 2),
    ):
        if hasattr(socket, name):  # Linux has all of them
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Address:
    """Where new connections go to, which may change."""

    def __init__(self, url: str, renew: Renew | None = None) -> None:
        self.url = url
        self._renew = renew

    async def connect(self, dsn: str | None = None, **options: Any) -> Connection:
        """A new connection, made as asyncpg makes it with `options`; `dsn` is what its pools would give, nothing.

        When the server refuses user or password, the address is read again, if it may change, and tried once more.

        Raises:
            DatabaseUnavailableError: the server refuses, and would take an address that may still come.
        """
        try:
            return cast(Connection, await asyncpg.connect(asyncpg_dsn(self.url), **options))
        except asyncpg.InvalidAuthorizationSpecificationError:
            if self._renew is None:
                raise
        renewed = await self._renew()
        try:
            connection = cast(Connection, await asyncpg.connect(asyncpg_dsn(renewed), **options))
        except asyncpg.InvalidAuthorizationSpecificationError:
            # The server's password may be changed before the one that is kept, or after it.
            raise DatabaseUnavailableError("The database refuses the user and password that are kept now.") from None
        self.url = renewed
        return connection


def asyncpg_dsn(url: str) -> str:
    """`url` without the driver name that SQLAlchemy addresses carry.

    Raises:
        ConfigurationError: `url` is not a PostgreSQL address.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
        raise ConfigurationError("DATABASE_URL must be a postgresql:// address.")
    return f"postgresql://{rest}"


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise what asyncpg raises for a lost connection as the project's own error."""
    try:
        yield
    except _REFUSED as error:
        raise _refused(error) from None
    except _UNAVAILABLE as error:
        if isinstance(error, ValueError):
            raise
        why = str(error) if isinstance(error, OSError) and str(error) else type(error).__name__
        raise DatabaseUnavailableError(f"The database cannot be reached: {why}.") from error


@contextmanager
def connection_errors() -> Iterator[None]:
    """The same while connecting, where whatever else goes wrong is the fault of the address."""
    try:
        with translated_errors():
            yield
    except (ValueError, asyncpg.PostgresError) as error:
        raise _refused(error) from None


def _refused(error: Exception) -> ConfigurationError:
    # The error's own words may hold the address with its password; those of the server do not.
    why = str(error) if isinstance(error, asyncpg.PostgresError) else type(error).__name__
    return ConfigurationError(f"DATABASE_URL is wrong, or the server refuses its user, password or database: {why}.")
