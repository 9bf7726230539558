"""What was read from the X API, by UTC day, because each of it is billed."""

from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from overtone.db.database import Database


@dataclass(frozen=True, slots=True)
class DayOfUse:
    """One kind of thing read on one day."""

    day: date
    resource: str
    count: int
    cost_usd: Decimal


async def add_usage(db: Database, resource: str, day: date, count: int, cost_usd: Decimal) -> None:
    """Add to what was read on `day`."""
    async with db.transaction() as connection:
        await connection.execute(
            "INSERT INTO overtone.api_usage AS u (day, resource, count, cost_usd) VALUES ($1, $2, $3, $4)"
            " ON CONFLICT (day, resource) DO UPDATE"
            " SET count = u.count + excluded.count, cost_usd = u.cost_usd + excluded.cost_usd",
            day,
            resource,
            count,
            cost_usd,
        )


async def usage_since(db: Database, first: date, resource: str | None = None) -> list[DayOfUse]:
    """What was read from `first` on, oldest first; of one resource or of all."""
    async with db.acquire() as connection:
        rows = await connection.fetch(
            "SELECT day, resource, count, cost_usd FROM overtone.api_usage"
            " WHERE day >= $1 AND ($2::text IS NULL OR resource = $2) ORDER BY day, resource",
            first,
            resource,
        )
    return [DayOfUse(**row) for row in rows]
