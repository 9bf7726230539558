"""The audit log: who changed what that others depend on, and when. It holds no secret, no text and no author."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from overtone.db.database import Connection, Database

Detail: TypeAlias = Mapping[str, str | int | float | bool | Sequence[str] | None]

_MAX_DETAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One administrative act."""

    id: int
    at: datetime
    actor: str
    """A key_id, or `cli:USER` for the command line."""
    action: str
    """`area.verb_past`, such as `key.created`."""
    subject: str | None
    """What was acted on: a key_id, the version of a model."""
    detail: dict[str, Any]


async def record_audit(
    connection: Connection, actor: str, action: str, subject: str | None = None, detail: Detail | None = None
) -> None:
    """Write down that `actor` did `action` to `subject`.

    Takes the connection of a transaction, so that an act and its entry are stored together or not at all.

    Raises:
        ValueError: `detail` is over 4096 bytes of JSON: ids, names and numbers belong there, nothing else.
    """
    plain = json.dumps(dict(detail or {}), sort_keys=True)
    if len(plain) > _MAX_DETAIL_BYTES:
        raise ValueError(f"detail: over {_MAX_DETAIL_BYTES} bytes")
    await connection.execute(
        "INSERT INTO overtone.audit_log (actor, action, subject, detail) VALUES ($1, $2, $3, $4::jsonb)",
        actor,
        action,
        subject,
        plain,
    )


async def read_audit(db: Database, *, newest: int = 50, action: str | None = None) -> list[AuditEntry]:
    """The newest entries, newest first; with `action` only those of it or, where it ends in a dot, of its area."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT id, at, actor, action, subject, detail FROM overtone.audit_log"
            " WHERE $2::text IS NULL OR action = $2 OR (right($2, 1) = '.' AND starts_with(action, $2))"
            " ORDER BY id DESC LIMIT $1",
            newest,
            action,
        )
    return [AuditEntry(**{**row, "detail": json.loads(row["detail"])}) for row in rows]
