"""Erasing a post or an author everywhere, with a receipt; and what is stored about an author.

The order is what makes it final: tombstones first, so that nothing new comes in, then every table, then files, then a
look whether anything is left, and the signed receipt last. A failure on the way leaves the tombstones: the same call
again goes on.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from overtone.db.audit import record_audit
from overtone.db.database import Database
from overtone.db.erasure import BATCH_POSTS, Removed, count_of, erase_letters, erase_posts, posts_of, versions_of
from overtone.db.tombstones import bury_authors
from overtone.erasure_files import erase_from_folder
from overtone.errors import InvalidInputError
from overtone.receipts import sign, signing_key
from overtone.settings import Settings

Kind = Literal["post", "author"]

REQUESTED = "requested"
"""The reason of tombstones that a person asked for: only a person may take them back."""

_MAX_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored about a post or an author."""

    post_ids: tuple[int, ...]
    rows: Removed


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure removed."""

    rows: Removed
    lines: int
    """Of files."""
    post_ids: tuple[int, ...]
    """Those that have tombstones now."""


@dataclass(frozen=True, slots=True)
class Eraser:
    """Erases from one database and from the files of one home."""

    db: Database
    key_for: Callable[[], Ed25519PrivateKey]
    """Reads the key that signs receipts; asked only for an erasure that gives one."""
    folders: Sequence[Path] = ()
    """Files under them are looked through."""

    async def erase(self, kind: Kind, number: int, *, actor: str, reason: str = REQUESTED) -> dict[str, Any]:
        """Erase the post or author with the id `number` and return the receipt.

        Raises:
            InvalidInputError: `number` can be nobody's id.
            ConfigurationError: the signing key cannot be used; nothing is erased.
            DatabaseUnavailableError: not all is erased; call again.
        """
        require_id(kind, number)
        asked_at, key = datetime.now(UTC), self.key_for()
        if kind == "post":
            done = await self.remove(await versions_of(self.db, number), (), reason=reason)
        else:
            done = await self.remove((), [number], reason=reason)
        receipt_id = str(uuid4())
        body = {
            "version": 1,
            "receipt_id": receipt_id,
            "kind": kind,
            "id": str(number),
            "reason": reason,
            "actor": actor,
            "asked_at": asked_at.isoformat(),
            "removed": {**asdict(done.rows), "lines_of_files": done.lines},
            "posts": {"count": len(done.post_ids), "sha256": digest_of(done.post_ids)},
            "left": asdict((await stored_of(self.db, kind, number)).rows),
            "done_at": datetime.now(UTC).isoformat(),
        }
        receipt = sign(body, key)
        async with self.db.transaction() as connection:
            detail = {"posts": len(done.post_ids), "reason": reason, "signature": receipt["signature"]}
            await record_audit(connection, actor, f"{kind}.erased", receipt_id, detail)
        return receipt

    async def remove(self, post_ids: Sequence[int], author_ids: Sequence[int], *, reason: str) -> Erased:
        """Erase posts, and authors with all their posts, without a receipt.

        Raises:
            DatabaseUnavailableError: not all is erased; call again.
        """
        await bury_authors(self.db, author_ids, reason=reason)
        removed, erased = Removed(), list[int]()
        for start in range(0, len(post_ids), BATCH_POSTS):
            removed += await erase_posts(self.db, post_ids[start : start + BATCH_POSTS], reason=reason)
            erased += post_ids[start : start + BATCH_POSTS]
        for author_id in author_ids:
            while batch := await posts_of(self.db, author_id):
                removed += await erase_posts(self.db, batch, reason=reason)
                erased += batch
        removed += Removed(dead_letters=await erase_letters(self.db, [*erased, *author_ids]))
        lines = await asyncio.to_thread(self._erase_files, erased, author_ids)
        return Erased(removed, lines, tuple(erased))

    def _erase_files(self, post_ids: Sequence[int], author_ids: Sequence[int]) -> int:
        return sum(erase_from_folder(folder, post_ids, author_ids) for folder in self.folders)


def open_eraser(settings: Settings, db: Database) -> Eraser:
    """The eraser of the installation that `settings` describe."""
    return Eraser(db, partial(signing_key, settings), erasable_folders(settings))


def erasable_folders(settings: Settings) -> tuple[Path, ...]:
    """The folders whose files hold posts: the spool, snapshots for training, results of jobs, an archive on disk, and
    those that the operator names."""
    archive = settings.archive_url or ""
    local = [Path(archive.removeprefix("file://"))] if archive and "://" not in archive.removeprefix("file://") else []
    return (
        settings.home / "spool",
        settings.home / "snapshots",
        settings.jobs_path,
        *local,
        *settings.erasure_folders,
    )


async def stored_of(db: Database, kind: Kind, number: int) -> Stored:
    """What is stored about a post or an author."""
    ids = await versions_of(db, number) if kind == "post" else await posts_of(db, number, limit=2**31 - 1)
    return Stored(tuple(ids), await count_of(db, ids))


def digest_of(post_ids: Sequence[int]) -> str:
    """SHA-256 of the sorted ids, one a line: whoever has the list can show that it is the one of a receipt."""
    return hashlib.sha256("".join(f"{one}\n" for one in sorted(post_ids)).encode()).hexdigest()


def require_id(kind: Kind, number: int) -> None:
    """Raise InvalidInputError unless `number` can be the id of a post or an author."""
    if not 0 < number <= _MAX_ID:
        raise InvalidInputError(f"The id of {'a post' if kind == 'post' else 'an author'} is from 1 to {_MAX_ID}.")
