"""The hot statements: SQL text in the folder `sql`, read once."""

from functools import cache
from importlib import resources


@cache
def query(name: str) -> str:
    """The statement in `sql/<name>.sql`."""
    return resources.files("overtone.db").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
