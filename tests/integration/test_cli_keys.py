"""`overtone keys` and `overtone audit` against a real database."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from overtone.cli.app import app
from overtone.cli.keys import cli_actor
from overtone.db import Database
from overtone.db.keys import find_key, hash_key, import_key
from overtone.errors import ConfigurationError, NotFoundError


class Shell:
    """Runs commands on one database and one home."""

    def __init__(self, url: str, home: Path, **extra: str) -> None:
        self.home = home
        self._runner = CliRunner(env={"DATABASE_URL": url, "OVERTONE_HOME": str(home), "COLUMNS": "300", **extra})

    def __call__(self, *arguments: str, answer: str | None = None) -> str:
        result = self._runner.invoke(app, list(arguments), input=answer, standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def shell(fresh_postgres_url: str, tmp_path: Path) -> Shell:
    return Shell(fresh_postgres_url, tmp_path)


def test_a_key_is_made_listed_rotated_and_revoked(shell: Shell) -> None:
    made = shell.json(
        "keys", "create", "--name", "ci", "--scope", "predict", "--expires", "90d", "--texts-per-day", "9"
    )
    [listed] = shell.json("keys", "list")
    assert listed["key_id"] == made["key_id"]
    assert listed["scopes"] == ["predict"]
    assert listed["limits"] == {"requests_per_minute": None, "texts_per_minute": None, "texts_per_day": 9}
    assert made["secret"] not in str(listed)

    rotated = shell.json("keys", "rotate", "ci", "--grace", "2h")
    assert rotated["key_id"] == made["key_id"]
    assert rotated["secret"] != made["secret"]
    assert shell.json("keys", "list")[0]["old_secret_until"] is not None

    assert shell.json("keys", "revoke", made["key_id"], "--yes") == {"key_id": made["key_id"], "revoked": True}
    assert shell.json("keys", "list") == []
    assert [info["state"] for info in shell.json("keys", "list", "--all")] == ["revoked"]
    told = shell.json("audit", "list", "--action", "key")
    assert [entry["action"] for entry in told] == ["key.revoked", "key.rotated", "key.created"]
    assert {entry["actor"] for entry in told} == {cli_actor()}


def test_people_are_told_in_words(shell: Shell) -> None:
    said = shell("keys", "create", "--name", "[red]team", "--requests-per-minute", "0")
    assert "[red]team" in said
    assert "ovt_" in said
    listed = shell("keys", "list")
    assert "any requests/min" in listed
    assert "ovt_" not in listed
    assert "ended now" in shell("keys", "rotate", "[red]team", "--grace", "0")
    assert "key.rotated" in shell("audit", "list")


def test_revoking_asks_first(shell: Shell) -> None:
    key_id = shell.json("keys", "create", "--name", "ci")["key_id"]
    with pytest.raises(typer.Abort):
        shell("keys", "revoke", "ci", answer="n\n")
    assert shell.json("keys", "list")[0]["state"] == "active"
    shell("keys", "revoke", key_id, answer="y\n")
    assert shell.json("keys", "list") == []


async def test_the_home_keeps_the_new_secret_of_its_key(shell: Shell, fresh_postgres_url: str) -> None:
    file = shell.home / "api_key"
    file.write_text("ovt_first\n")
    db = await Database.open(fresh_postgres_url)
    await import_key(db, "first key", "ovt_first", ["predict"])
    rotated = await asyncio.to_thread(shell.json, "keys", "rotate", "first key", "--grace", "0")
    secret = rotated["secret"]
    assert file.read_text().strip() == secret
    assert file.stat().st_mode & 0o777 == 0o600
    assert await find_key(db, hash_key("ovt_first")) is None
    assert await find_key(db, hash_key(secret))
    await db.close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("keys", "create", "--name", "", "--scope", "read"), ConfigurationError),
        (("keys", "create", "--name", "x", "--scope", "root"), ConfigurationError),
        (("keys", "create", "--name", "x", "--expires", "20y"), ConfigurationError),
        (("keys", "rotate", "nobody"), NotFoundError),
        (("keys", "revoke", "nobody", "--yes"), NotFoundError),
    ],
)
def test_what_makes_no_sense_is_refused(shell: Shell, arguments: tuple[str, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        shell(*arguments)


def test_two_keys_of_one_name_are_told_apart_by_id(shell: Shell) -> None:
    for _ in range(2):
        shell("keys", "create", "--name", "twin")
    with pytest.raises(ConfigurationError, match="2 keys"):
        shell("keys", "rotate", "twin")


def test_a_secret_chosen_beforehand_becomes_a_key(fresh_postgres_url: str, tmp_path: Path) -> None:
    chosen = Shell(fresh_postgres_url, tmp_path, OVERTONE_API_KEY="chosen-before-the-tables-were-there")
    first = chosen.json("keys", "import", "--name", "ingest", "--scope", "predict")
    assert chosen.json("keys", "import", "--name", "ingest") == first
    (found,) = chosen.json("keys", "list")
    assert (found["key_id"], found["name"], found["scopes"]) == (first["key_id"], "ingest", ["predict"])
    with pytest.raises(ConfigurationError, match="20 characters"):
        Shell(fresh_postgres_url, tmp_path, OVERTONE_API_KEY="short")("keys", "import")
