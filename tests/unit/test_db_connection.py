"""What a wrong or dead address comes to, without a server."""

from pathlib import Path

import pytest

from overtone.db import Database
from overtone.db.database import asyncpg_dsn
from overtone.db.embedded import EmbeddedPostgres, find_binaries
from overtone.db.keys import hash_key, new_secret
from overtone.db.migrate import include_name, include_object, upgrade
from overtone.db.queries import query
from overtone.errors import ConfigurationError, DatabaseUnavailableError, EnvironmentProblemError


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_every_form_of_address_is_understood(scheme: str) -> None:
    assert asyncpg_dsn(f"{scheme}://u:p@h:5/d?host=/run/x") == "postgresql://u:p@h:5/d?host=/run/x"


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "secret", "", "postgresql://u:secret@h:port/d"])
async def test_a_wrong_address_is_a_configuration_error_without_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await Database.open(url)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        await upgrade(url)


@pytest.mark.parametrize("url", ["postgresql://u:secret@127.0.0.1:1/d", "postgresql://u@/d?host=/nowhere"])
async def test_a_dead_address_is_unavailable(url: str) -> None:
    with pytest.raises(DatabaseUnavailableError) as caught:
        await Database.open(url)
    assert "secret" not in str(caught.value)
    with pytest.raises(DatabaseUnavailableError):
        await upgrade(url)


def test_partitions_are_left_out_of_comparisons() -> None:
    assert include_name("posts", "table", {})
    assert not include_name("posts_2026_11", "table", {})
    assert not include_name(None, "table", {})
    assert not include_name("public", "schema", {})
    assert not include_object(None, "predictions_2010_11", "table", True, None)
    assert include_object(None, "ix_posts_author_id", "index", True, None)


def test_secrets_differ_and_are_known_by_their_hash() -> None:
    first, second = new_secret(), new_secret()
    assert first != second
    assert first.startswith("ovt_")
    assert len(first) >= 36
    assert len(hash_key(first)) == 32
    assert hash_key("\ud800") != hash_key("?")


def test_statements_are_packaged() -> None:
    assert "ON CONFLICT (post_id) DO NOTHING" in query("write_posts")


def test_a_socket_path_that_is_too_long_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match="too long"):
        EmbeddedPostgres(tmp_path / "data", tmp_path / ("x" * 120))


def test_the_newest_server_of_the_package_is_found() -> None:
    assert find_binaries().parent.name == "pginstall18"
