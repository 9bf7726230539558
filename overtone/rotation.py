"""Secrets that change while a process runs: read again where they are kept, and handed to the parts that use them.

A part that cannot work with a new secret keeps the old one and is given the new one again at the next reading, so it
does not matter whether the place where a secret is kept is changed before or after what checks the secret.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from overtone import metrics
from overtone.errors import OvertoneError, UnavailableError
from overtone.logging import get_logger
from overtone.secrets import open_stores
from overtone.settings import Settings, read_secrets

Follower = Callable[[Settings], Awaitable[None]]
"""Takes in a secret that changed; raises if it is no good now, to be asked again later."""

_RENEW_S = 1.0

_log = get_logger()


@dataclass(slots=True, eq=False)
class _Follower:
    name: str
    take: Follower
    taken: object


class Rotation:
    """The settings of a process, whose secrets are kept fresh. For one event loop."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`settings` as they were read at the start.

        Raises:
            EnvironmentProblemError: the library of a store is not installed.
        """
        self._settings = settings
        self._stores = open_stores(settings.secrets_from)
        self._clock = clock
        self._followers: list[_Follower] = []
        self._read_at = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._is_failing = False

    @property
    def settings(self) -> Settings:
        """The settings, with every secret as it was when it could last be read."""
        return self._settings

    def follow(self, name: str, take: Follower) -> Callable[[], None]:
        """Have `take` called with the settings whenever the secret `name` has another value, which may be None.

        What is returned ends that.
        """
        follower = _Follower(name, take, getattr(self._settings, name))
        self._followers.append(follower)
        return lambda: self._followers.remove(follower)

    async def keep_fresh(self) -> None:
        """Read again every `secrets_refresh_s` seconds for as long as the task runs; returns if nothing can change."""
        while self._settings.may_change:
            await asyncio.sleep(self._settings.secrets_refresh_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Read again, once for all who ask at the same time. What cannot be read stays as it was."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._refresh())
            self._reading.add_done_callback(lambda _: setattr(self, "_reading", None))
        await asyncio.shield(self._reading)

    async def renew(self) -> Settings:
        """The settings as they are now: read again, unless that was done within the last second."""
        if self._settings.may_change and self._clock() - self._read_at >= _RENEW_S:
            await self.refresh()
        return self._settings

    @property
    def renew_database_url(self) -> Callable[[], Awaitable[str]] | None:
        """Reads DATABASE_URL again, as `renew` does; None if it cannot change."""
        return self._database_url if "database_url" in self._settings.may_change else None

    async def _database_url(self) -> str:
        url = (await self.renew()).database_url
        return url.get_secret_value() if url is not None else ""

    async def _refresh(self) -> None:
        try:
            self._settings = await asyncio.to_thread(self._read)
        except Exception as error:  # whatever it is, the process goes on with the secrets it has
            metrics.SECRETS_READ.labels("failed").inc()
            if not self._is_failing:
                _log.warning("secrets.not_read", **_reason(error))
            self._is_failing = True
        else:
            metrics.SECRETS_READ.labels("read").inc()
            if self._is_failing:
                _log.info("secrets.read_again")
            self._is_failing = False
        self._read_at = self._clock()
        for follower in list(self._followers):
            await self._hand_over(follower)

    def _read(self) -> Settings:
        fresh = read_secrets(self._settings, self._stores)
        had = any(getattr(self._settings, name) is not None for name in self._settings.may_change)
        if had and all(getattr(fresh, name) is None for name in fresh.may_change):
            raise UnavailableError("The secrets that were kept there are all gone.")
        return fresh

    async def _hand_over(self, follower: _Follower) -> None:
        value = getattr(self._settings, follower.name)
        if value == follower.taken:
            return
        try:
            await follower.take(self._settings)
        except Exception as error:  # as above; another part may take it
            _log.warning("secrets.not_taken", secret=follower.name, **_reason(error))
            return
        follower.taken = value
        _log.info("secrets.changed", secret=follower.name)


def _reason(error: Exception) -> dict[str, str]:
    """What may be logged of `error`: the words of errors that are not ours may hold a secret."""
    if isinstance(error, OvertoneError):
        return {"code": error.code, "reason": error.message}
    return {"code": "internal", "reason": type(error).__name__}
