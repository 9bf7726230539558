"""Who of several processes reads a stream: the one that holds an advisory lock on a connection of its own.

The lock goes with its session, so it ends with the process, with the server, or when the server has heard nothing for
`lease_s`: a process that hangs or is cut off loses it without anybody's clock being asked. Since a process may not
know yet that it lost the lock, each leader claims a higher epoch, which every write of the stream is checked against.
"""

import asyncio
import hashlib
import random
from collections.abc import Callable

from ingest.options import LeaderOptions
from overtone.db.database import Address, Connection, connection_errors, translated_errors, watch_silence
from overtone.errors import DatabaseUnavailableError, FencedError, OvertoneError
from overtone.logging import get_logger

_CONNECT_TIMEOUT_S = 5.0

_log = get_logger()


class Leadership:
    """The lock of `stream`, held or wanted."""

    def __init__(
        self, address: Address, stream: str, options: LeaderOptions, note: Callable[[OvertoneError], None]
    ) -> None:
        """`note` hears of it when the database at `address` is away."""
        self._address = address
        self._stream = stream
        self._options = options
        self._note = note
        self._key = int.from_bytes(hashlib.sha256(f"overtone ingest {stream}".encode()).digest()[:8], signed=True)
        self._connection: Connection | None = None
        self._is_lost = asyncio.Event()

    @property
    def is_sure(self) -> bool:
        """Whether the lock is held as far as anyone can tell; not while the database is away."""
        return self._connection is not None and not self._is_lost.is_set()

    async def try_once(self) -> bool:
        """Take the lock unless somebody else has it or the database is away; whether it is held now."""
        try:
            return await self._try()
        except DatabaseUnavailableError as error:
            self._note(error)
            await self.close()
            return False

    async def wait(self) -> None:
        """Return once the lock is held."""
        while not await self.try_once():  # noqa: ASYNC110  another process lets go of it
            await asyncio.sleep(self._options.poll_s * random.uniform(0.5, 1.0))

    async def hold(self, epoch: int) -> None:
        """Keep the lock, and take it again when the database was away, until somebody else leads.

        Raises:
            FencedError: somebody else leads, with an epoch above `epoch`.
        """
        while True:
            try:
                await self._beat()
            except DatabaseUnavailableError as error:
                self._note(error)
                _log.warning("leader.unsure", stream=self._stream)
                await self.close()
                await self._regain(epoch)
                _log.info("leader.sure_again", stream=self._stream)

    async def close(self) -> None:
        """Let the lock go."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _try(self) -> bool:
        connection = self._connection or await self._connect()
        with translated_errors():
            held = await connection.fetchval(
                "SELECT pg_try_advisory_lock($1)", self._key, timeout=self._options.lease_s
            )
        return bool(held)

    async def _connect(self) -> Connection:
        with connection_errors():
            connection = await self._address.connect(
                timeout=_CONNECT_TIMEOUT_S,
                server_settings={"application_name": "overtone-ingest-leader"},
            )
            await watch_silence(connection)
            self._connection = connection
            self._is_lost.clear()
            connection.add_termination_listener(self._note_lost)
            await connection.execute(f"SET idle_session_timeout = {int(self._options.lease_s * 1000)}")
        return connection

    def _note_lost(self, connection: object) -> None:
        if connection is self._connection:
            self._is_lost.set()

    async def _beat(self) -> None:
        """Wait a little, and let the server hear of this process."""
        connection = self._connection
        if connection is None or self._is_lost.is_set():
            raise DatabaseUnavailableError("The connection that holds the lock broke.")
        try:
            await asyncio.wait_for(self._is_lost.wait(), self._options.lease_s / 4)
        except TimeoutError:
            with translated_errors():
                await connection.fetchval("SELECT 1", timeout=self._options.lease_s / 2)

    async def _regain(self, epoch: int) -> None:
        while True:
            is_held = await self.try_once()
            if self._connection is not None:
                try:
                    await self._check(epoch)
                except DatabaseUnavailableError as error:
                    self._note(error)
                    await self.close()
                    is_held = False
            if is_held:
                return
            # Whoever has the lock is a new leader, whose epoch will tell, or this process's own dead session.
            await asyncio.sleep(self._options.poll_s)

    async def _check(self, epoch: int) -> None:
        assert self._connection is not None
        with translated_errors():
            newest = await self._connection.fetchval(
                "SELECT epoch FROM overtone.stream_cursor WHERE stream = $1", self._stream, timeout=5.0
            )
        if newest is not None and newest > epoch:
            raise FencedError(f"Another process reads the stream {self._stream!r} now.", stream=self._stream)
