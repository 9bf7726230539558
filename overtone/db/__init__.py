"""PostgreSQL: the tables, the statements that move posts and predictions, the embedded server."""

from overtone.db.database import Database

__all__ = ["Database"]
