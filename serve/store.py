"""The database as the API needs it: keys, sessions and figures, connected when first needed."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from overtone.db import keys
from overtone.db.database import Database, Renew
from overtone.db.feedback import Feedback, Written, write_feedback
from overtone.db.predictions import stats
from overtone.erasure import Eraser, Kind
from overtone.errors import ConfigurationError, DatabaseUnavailableError, UnavailableError
from overtone.logging import get_logger
from serve.auth import Identity
from serve.quotas import Allowance


class Store:
    """One database, which may be away at the start and at any time after."""

    def __init__(
        self,
        url: str | None,
        *,
        max_connections: int = 4,
        default: Allowance | None = None,
        eraser_for: Callable[[Database], Eraser] | None = None,
        renew: Renew | None = None,
    ) -> None:
        """Nothing is connected yet. Without `url` every call raises `DatabaseUnavailableError`.

        `default` holds the limits of keys that set none of their own. Without `eraser_for` nothing can be erased.
        `renew` reads the address again when the server refuses its user or password.
        """
        self._eraser_for = eraser_for
        self._renew = renew
        self._url = url
        self._default = default or Allowance()
        self._max_connections = max_connections
        self._database: Database | None = None
        self._opening = asyncio.Lock()

    async def active(self) -> Mapping[bytes, Identity]:
        """See `KeyStore.active`."""
        return {record.key_hash: self._identity(record) for record in await keys.active_keys(await self._open())}

    async def find(self, digest: bytes) -> Identity | None:
        """See `KeyStore.find`."""
        record = await keys.find_key(await self._open(), digest)
        return self._identity(record) if record else None

    async def exchange_sign_in(self, token: str) -> str | None:
        """The secret of a new session for a one-time token; None if the token is not good."""
        return await keys.exchange_sign_in(await self._open(), token)

    async def create_session(self, key_id: str, until: datetime | None = None) -> str | None:
        """The secret of a new session with the scopes of a key; None if the key is not good."""
        return await keys.create_session(await self._open(), key_id, until=until)

    async def end_session(self, session_id: str) -> None:
        """End a session, if it has not ended."""
        await keys.revoke(await self._open(), session_id, actor=session_id)

    async def figures(self, *, minutes: int, newest: int) -> dict[str, Any]:
        """What `GET /stats` shows, ready for JSON."""
        found = await stats(await self._open(), minutes=minutes, newest=newest)
        return {
            "posts": found.posts,
            "predictions": found.predictions,
            "labels": found.labels,
            "per_second": found.per_second,
            "series": [{"minute": item.minute, **item.labels} for item in found.series],
            "newest": [
                {
                    "post_id": str(post.post_id),  # JavaScript cannot hold a snowflake as a number
                    "text": post.text,
                    "created_at": post.created_at,
                    "label": post.label,
                    "confidence": post.confidence,
                    "model_version": post.model_version,
                }
                for post in found.newest
            ],
            "model_version": found.model_version,
            "source": found.source,
        }

    async def give_feedback(self, item: Feedback, *, key_id: str) -> Written | None:
        """Store what a caller says; None if it is about a post that is not stored."""
        [written] = await write_feedback(await self._open(), [item], key_id=key_id)
        return written

    async def erase(self, kind: Kind, number: int, *, actor: str) -> dict[str, Any]:
        """Erase a post or an author everywhere and return the receipt; see `overtone.erasure`."""
        if self._eraser_for is None:
            raise UnavailableError("Erasure is not configured here.")
        return await self._eraser_for(await self._open()).erase(kind, number, actor=actor)

    async def move_to(self, url: str) -> None:
        """Use the database at `url` from now on; see `Database.move_to`."""
        async with self._opening:
            if self._database is not None:
                await self._database.move_to(url)
            self._url = url

    async def close(self) -> None:
        """Close the connections."""
        if self._database is not None:
            await self._database.close()

    async def database(self) -> Database:
        """The database, connected.

        Raises:
            DatabaseUnavailableError: it is away, or none is configured.
        """
        return await self._open()

    async def _open(self) -> Database:
        if self._database is not None:
            return self._database
        if self._url is None:
            raise DatabaseUnavailableError("No database is configured: DATABASE_URL is not set.")
        async with self._opening:
            if self._database is None:
                try:
                    self._database = await Database.open(
                        self._url,
                        max_size=self._max_connections,
                        application_name="overtone-serve",
                        renew=self._renew,
                    )
                except ConfigurationError as error:
                    get_logger().error("database.refused", reason=error.message)
                    raise DatabaseUnavailableError("The database refuses the address it was given.") from error
        return self._database

    def _identity(self, record: keys.KeyRecord) -> Identity:
        default, own = self._default, record.limits
        allowance = Allowance(
            _chosen(own.requests_per_minute, default.requests_per_minute),
            _chosen(own.texts_per_minute, default.texts_per_minute),
            _chosen(own.texts_per_day, default.texts_per_day),
        )
        return Identity(
            record.key_id,
            record.scopes,
            record.expires_at,
            record.account,
            allowance or None,
            is_session=record.kind == "session",
        )


def _chosen(own: int | None, default: int) -> int:
    return default if own is None else own
