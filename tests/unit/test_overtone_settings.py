"""Settings: every variable is documented, checked and explained; no value of a wrong one is repeated."""

from pathlib import Path

import pytest

from overtone.errors import ConfigurationError
from overtone.settings import Settings, env_example, environment_for, load_settings

ROOT = Path(__file__).parents[2]

GUIDE = """TWITTER_BEARER_TOKEN DATABASE_URL REDIS_URL MLFLOW_TRACKING_URI MLFLOW_EXPERIMENT_NAME WANDB_API_KEY
WANDB_PROJECT MODEL_NAME MAX_LENGTH BATCH_SIZE LEARNING_RATE NUM_EPOCHS API_HOST API_PORT MIN_SAMPLES_FOR_RETRAIN
RETRAIN_INTERVAL_HOURS LOG_LEVEL LOG_FORMAT API_KEY_HEADER CORS_ORIGINS""".split()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(_variable(name), raising=False)
    monkeypatch.chdir(tmp_path)


def _variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else name.upper()


def test_env_example_is_what_the_settings_say() -> None:
    assert (ROOT / ".env.example").read_text() == env_example()


@pytest.mark.parametrize("variable", GUIDE)
def test_every_variable_of_the_guide_is_in_the_example(variable: str) -> None:
    assert f"# {variable}=" in env_example()


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_defaults_need_no_environment() -> None:
    settings = load_settings()
    assert settings.api_host == "127.0.0.1"
    assert settings.database_url is None
    assert settings.home.is_absolute()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("API_PORT", "0"),
        ("API_PORT", "eighty"),
        ("MAX_LENGTH", "4"),
        ("LEARNING_RATE", "-1"),
        ("NUM_EPOCHS", "1.5"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("DATABASE_URL", "mysql://user:hunter2@host/db"),
        ("REDIS_URL", "http://:hunter2@host"),
        ("X_API_BASE_URL", "ftp://x"),
        ("CORS_ORIGINS", "https://ok.example,nonsense"),
        ("API_KEY_HEADER", "not a header"),
        ("SIMULATOR_RATE", "0"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert caught.value.message.startswith(f"{variable}: ")
    assert "Allowed: " in caught.value.message
    assert "hunter2" not in caught.value.message


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_PORT", "0")
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert {line.split(":")[0] for line in caught.value.message.splitlines()} == {"API_PORT", "LOG_LEVEL"}


def test_an_empty_value_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    assert load_settings().database_url is None


def test_origins_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example/, http://b.example:8080")
    assert load_settings().cors_origins == ("https://a.example", "http://b.example:8080")


def test_dotenv_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("API_PORT=9001\nLOG_LEVEL=DEBUG\n")
    monkeypatch.setenv("API_PORT", "9002")
    settings = load_settings()
    assert (settings.api_port, settings.log_level) == (9002, "DEBUG")


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWITTER_BEARER_TOKEN", "hunter2")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@h/d")
    assert "hunter2" not in repr(load_settings())


def test_children_take_the_settings_and_do_not_belong_to_a_job_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x.zip"}}')
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    given = environment_for(load_settings(api_port=8123), EXTRA="1")
    assert (given["API_PORT"], given["EXTRA"], given["RAY_ADDRESS"]) == ("8123", "1", "127.0.0.1:6379")
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" not in given
