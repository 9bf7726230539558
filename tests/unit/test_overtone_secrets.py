"""Secrets from files and stores: which source wins, what is said of a wrong one, and that changes are followed."""

import os
from pathlib import Path

import pytest

from overtone.errors import ConfigurationError, DatabaseUnavailableError, OvertoneError
from overtone.rotation import Rotation
from overtone.secrets import open_stores
from overtone.settings import Settings, environment_for, load_settings, secret_names

LONG = "a secret of more than thirty-two bytes"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(f"{name.upper()}_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that SECRETS_FROM names."""
    found = tmp_path / "kept"
    found.mkdir()
    monkeypatch.setenv("SECRETS_FROM", f"file://{found}")
    return found


def shown(settings: Settings, name: str) -> str | None:
    secret = getattr(settings, name)
    return secret.get_secret_value() if secret is not None else None


def test_every_secret_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = dict.fromkeys(secret_names(), LONG) | {"database_url": "postgresql://h/d", "redis_url": "redis://h"}
    for name, value in values.items():
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.setenv(f"{name.upper()}_FILE", str(tmp_path / name))
    settings = load_settings()
    assert {name: shown(settings, name) for name in secret_names()} == values
    assert settings.may_change == secret_names()


def test_a_file_may_be_named_in_dotenv(tmp_path: Path) -> None:
    (tmp_path / "db").write_text("postgresql://u:p@h/d")
    (tmp_path / ".env").write_text("DATABASE_URL_FILE=db\n")
    settings = load_settings()
    assert shown(settings, "database_url") == "postgresql://u:p@h/d"
    assert environment_for(settings)["DATABASE_URL_FILE"] == str(tmp_path / "db"), "whatever folder a child is in"


def test_the_environment_wins_over_a_file_and_that_over_a_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    for name in ("JWT_SECRET", "OVERTONE_API_KEY", "TWITTER_BEARER_TOKEN"):
        (folder / name).write_text(f"{LONG} in the store")
    monkeypatch.setenv("JWT_SECRET", f"{LONG} in the environment")
    monkeypatch.setenv("OVERTONE_API_KEY_FILE", str(tmp_path / "key"))
    (tmp_path / "key").write_text("in a file")
    settings = load_settings()
    assert shown(settings, "jwt_secret") == f"{LONG} in the environment"
    assert shown(settings, "overtone_api_key") == "in a file"
    assert shown(settings, "twitter_bearer_token") == f"{LONG} in the store"
    assert settings.may_change == secret_names() - {"jwt_secret"}


def test_the_first_of_several_stores_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "jwt_secret").write_text(f"{LONG} {number}")
    (tmp_path / "2" / "wandb_api_key").write_text("two")
    monkeypatch.setenv("SECRETS_FROM", f"file://{tmp_path}/1, file://{tmp_path}/2")
    settings = load_settings()
    assert (shown(settings, "jwt_secret"), shown(settings, "wandb_api_key")) == (f"{LONG} 1", "two")


def test_what_is_no_secret_comes_from_no_store(folder: Path) -> None:
    (folder / "API_PORT").write_text("1")
    (folder / ".hidden").write_text("x")
    (folder / "folder").mkdir()
    assert load_settings().api_port == 8000


def test_a_variable_and_its_file_are_not_both_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hunter2")
    monkeypatch.setenv("OVERTONE_API_KEY", "hunter2")
    monkeypatch.setenv("OVERTONE_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ConfigurationError, match="OVERTONE_API_KEY and OVERTONE_API_KEY_FILE are both set") as caught:
        load_settings()
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"\xff", "not UTF-8"), (b"x" * 70_000, "65536 bytes"), (b"hunter2", "32 bytes")],
)
def test_a_secret_that_cannot_be_used_is_told_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "s").write_bytes(content)
    monkeypatch.setenv("JWT_SECRET_FILE", str(tmp_path / "s"))
    with pytest.raises(ConfigurationError, match=said) as caught:
        load_settings()
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://x", "must begin with"),
        ("file+http:///x", "must begin with"),
        ("file://run/secrets", "absolute path"),
        ("aws://", "name of a secret"),
        ("vault://h:8200/secret", "HOST:PORT/MOUNT/PATH"),
        ("vault://u:hunter2@h/secret/x", "user or password"),
        ("vault+http://vault.example/secret/x", "loopback alone"),
        ("aws://x?regoin=eu", "regoin: not an option of aws://"),
    ],
)
def test_a_wrong_address_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("SECRETS_FROM", address)
    with pytest.raises(ConfigurationError, match=r"SECRETS_FROM: .*Allowed: ") as caught:
        load_settings()
    assert said in caught.value.message
    assert "hunter2" not in caught.value.message
    with pytest.raises(ConfigurationError, match="SECRETS_FROM: "):
        open_stores([address])


def test_a_folder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRETS_FROM", f"file://{tmp_path}/absent")
    with pytest.raises(ConfigurationError, match="absent cannot be read"):
        load_settings()


async def test_a_change_is_handed_to_those_who_follow_it(folder: Path) -> None:
    (folder / "jwt_secret").write_text(LONG)
    (folder / "redis_url").write_text("redis://h")
    taken: list[str | None] = []
    rotation = Rotation(load_settings())

    async def take(settings: Settings) -> None:
        taken.append(shown(settings, "jwt_secret"))

    end = rotation.follow("jwt_secret", take)
    await rotation.refresh()
    assert taken == []
    (folder / "jwt_secret").write_text(f"{LONG} 2")
    await rotation.refresh()
    (folder / "jwt_secret").unlink()
    await rotation.refresh()
    end()
    (folder / "jwt_secret").write_text(LONG)
    await rotation.refresh()
    assert taken == [f"{LONG} 2", None]


async def test_what_a_part_cannot_take_is_handed_to_it_again(folder: Path) -> None:
    (folder / "database_url").write_text("postgresql://u:1@h/d")
    rotation = Rotation(load_settings())
    tries: list[str] = []

    async def take(settings: Settings) -> None:
        tries.append(shown(settings, "database_url") or "")
        if len(tries) < 3:
            raise DatabaseUnavailableError

    rotation.follow("database_url", take)
    (folder / "database_url").write_text("postgresql://u:2@h/d")
    for _ in range(5):
        await rotation.refresh()
    assert tries == ["postgresql://u:2@h/d"] * 3


def spoil(folder: Path, how: str) -> None:
    if how == "wrong":
        (folder / "database_url").write_text("mysql://u:2@h/d")
    else:
        (folder / "database_url").unlink()
    if how == "gone":
        folder.rmdir()


def mend(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "database_url").write_text("postgresql://u:3@h/d")


@pytest.mark.parametrize("broken", ["wrong", "gone", "empty"])
async def test_secrets_stay_while_they_cannot_be_read(folder: Path, broken: str) -> None:
    (folder / "database_url").write_text("postgresql://u:1@h/d")
    rotation = Rotation(load_settings())
    spoil(folder, broken)
    await rotation.refresh()
    assert shown(rotation.settings, "database_url") == "postgresql://u:1@h/d"
    mend(folder)
    await rotation.refresh()
    assert shown(rotation.settings, "database_url") == "postgresql://u:3@h/d"


async def test_renewing_reads_at_most_once_a_second(folder: Path) -> None:
    (folder / "database_url").write_text("postgresql://u:1@h/d")
    now = [0.0]
    rotation = Rotation(load_settings(), clock=lambda: now[0])
    renew = rotation.renew_database_url
    assert renew is not None
    found = []
    for number, seconds in ((2, 0.0), (3, 0.9), (4, 1.0)):
        now[0] = seconds
        (folder / "database_url").write_text(f"postgresql://u:{number}@h/d")
        found.append(await renew())
    assert found == ["postgresql://u:2@h/d", "postgresql://u:2@h/d", "postgresql://u:4@h/d"]


async def test_secrets_of_the_environment_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:1@h/d")
    rotation = Rotation(load_settings())
    assert rotation.renew_database_url is None
    await rotation.keep_fresh()  # returns: there is nothing to do


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, address in (("boto3", "aws://overtone"), ("hvac", "vault://h:8200/secret/overtone")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(OvertoneError, match=rf"{module}: pip install 'overtone\[secrets\]'"):
            open_stores([address])


def test_nothing_shows_a_secret(folder: Path) -> None:
    (folder / "database_url").write_text("postgresql://u:hunter2@h/d")
    settings = load_settings()
    assert "hunter2" not in repr(settings)
    assert not any("hunter2" in value for value in environment_for(settings).values() if os.environ)
