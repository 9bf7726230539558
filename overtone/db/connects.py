"""When connections to a stream were made: X counts them over all processes, and over their ends."""

from datetime import datetime, timedelta

from overtone.db.database import Database


async def note_connect(db: Database, stream: str, made_at: datetime, *, keep: timedelta) -> int:
    """Write down a connection, forget those older than `keep`, and return its id."""
    async with db.transaction() as connection:
        await connection.execute(
            "DELETE FROM overtone.stream_connects WHERE stream = $1 AND made_at < $2", stream, made_at - keep
        )
        return int(
            await connection.fetchval(
                "INSERT INTO overtone.stream_connects (stream, made_at) VALUES ($1, $2) RETURNING id", stream, made_at
            )
        )


async def forget_connect(db: Database, connect_id: int) -> None:
    """Take back a connection that never reached X."""
    async with db.transaction() as connection:
        await connection.execute("DELETE FROM overtone.stream_connects WHERE id = $1", connect_id)


async def connects_since(db: Database, stream: str, first: datetime) -> list[datetime]:
    """When connections were made from `first` on, oldest first."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT made_at FROM overtone.stream_connects WHERE stream = $1 AND made_at >= $2 ORDER BY made_at",
            stream,
            first,
        )
    return [row["made_at"] for row in rows]
