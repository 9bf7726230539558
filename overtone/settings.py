"""The settings of a process: the only code that reads the environment.

An entry point calls `load_settings()` once and passes the result down. Sources, first wins: the environment, the
file `.env` in the working directory, the defaults here.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from overtone.errors import ConfigurationError


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ValueError("must be an http:// or https:// address")
    return value.rstrip("/")


def _postgres_url(value: SecretStr) -> SecretStr:
    if urlsplit(value.get_secret_value()).scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
        raise ValueError("must be a postgresql:// address")
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    if urlsplit(value.get_secret_value()).scheme not in {"redis", "rediss", "unix"}:
        raise ValueError("must be a redis:// or rediss:// address")
    return value


HttpUrl = Annotated[str, AfterValidator(_http_url)]


class Settings(BaseSettings):
    """Every environment variable the product reads, with its unit, range and default."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
    )

    # --- where things are kept
    overtone_home: Path = Field(
        Path("~/.overtone"), description="Folder of all local state: key, database, logs. A path."
    )

    # --- X API
    twitter_bearer_token: SecretStr | None = Field(
        None, description="App-only bearer token of the X API. Unset: posts come from the built-in simulator."
    )
    x_api_base_url: HttpUrl = Field("https://api.x.com", description="Root of the X API. An http(s) address.")
    simulator_rate: float = Field(
        50.0, gt=0, le=10_000, description="Posts a second the built-in simulator sends. Above 0, to 10000."
    )

    # --- stores
    database_url: Annotated[SecretStr, AfterValidator(_postgres_url)] | None = Field(
        None, description="postgresql:// address. Unset: an embedded PostgreSQL under OVERTONE_HOME."
    )
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = Field(
        None, description="redis:// address of the shared store. Unset: in-process. Checked; reserved, not used yet."
    )

    # --- tracking of training runs
    mlflow_tracking_uri: str | None = Field(
        None, description="MLflow server or store where training runs are recorded. Unset: runs are not recorded."
    )
    mlflow_experiment_name: str = Field(
        "overtone", min_length=1, max_length=200, description="MLflow experiment. 1 to 200 characters."
    )
    wandb_api_key: SecretStr | None = Field(None, description="Weights & Biases key. Checked; reserved, not used yet.")
    wandb_project: str = Field(
        "overtone",
        min_length=1,
        max_length=128,
        description="Weights & Biases project. 1 to 128 characters. Checked; reserved, not used yet.",
    )

    # --- training; a value set here wins over the same value of the YAML file
    model_name: str | None = Field(
        None,
        min_length=1,
        description="Base encoder: hub name, folder, or `minilm` for the offline one. Default: the training file's.",
    )
    max_length: int | None = Field(
        None,
        ge=8,
        le=512,
        description="Longest text, in tokens. 8 to 512. Default: the training file's or the bundle's.",
    )
    batch_size: int | None = Field(
        None, ge=1, le=4096, description="Texts a training step. 1 to 4096. Default: the training file's."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate. Above 0, to 1. Default: the training file's."
    )
    num_epochs: int | None = Field(
        None, ge=1, le=100, description="Passes over the training set. 1 to 100. Default: the training file's."
    )
    min_samples_for_retrain: int = Field(
        1000,
        ge=1,
        le=10_000_000,
        description="New labels after which retraining is due. 1 to 10000000. Checked; reserved, not used yet.",
    )
    retrain_interval_hours: int = Field(
        168,
        ge=1,
        le=8760,
        description="Hours after which retraining is due. 1 to 8760. Checked; reserved, not used yet.",
    )

    # --- serving
    api_host: str = Field(
        "127.0.0.1", min_length=1, description="Address the API listens on. Loopback unless you choose otherwise."
    )
    api_port: int = Field(8000, ge=1, le=65535, description="TCP port of the API. 1 to 65535.")
    api_key_header: str = Field(
        "X-API-Key",
        pattern=r"^[A-Za-z0-9-]{1,64}$",
        description="Request header with the API key. Letters, digits, dashes.",
    )
    overtone_api_key: SecretStr | None = Field(
        None,
        description="Key the command line and the ingest actor send. Unset: the one in OVERTONE_HOME/api_key.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins that browsers may call from: comma-separated http(s) origins, or * for any. Unset: none.",
    )
    bundle: Path | None = Field(
        None, description="Folder of the model bundle to serve. Unset: the bundle in the package."
    )
    serve_replicas: int | None = Field(
        None, ge=1, le=1024, description="Serving replicas, one thread each. 1 to 1024. Default: one a core, at most 8."
    )

    # --- logs and metrics
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["json", "console"] = Field("json", description="json or console.")
    prometheus_multiproc_dir: Path | None = Field(
        None,
        description="Folder through which the processes of one machine add up their metrics. Set by `overtone up`.",
    )

    @property
    def home(self) -> Path:
        """`overtone_home`, absolute, with `~` resolved."""
        return self.overtone_home.expanduser().absolute()

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        origins = tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(origin if origin == "*" else _http_url(origin) for origin in origins)


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` win over every source.

    Raises:
        ConfigurationError: naming each variable that is wrong and what it may be, never a value.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [_explain(str(item["loc"][0]) if item["loc"] else "settings", item["msg"]) for item in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None


def _explain(name: str, problem: str) -> str:
    field: FieldInfo | None = Settings.model_fields.get(name)
    allowed = f" Allowed: {field.description}" if field and field.description else ""
    return f"{name.upper()}: {problem}.{allowed}"


def environment_for(settings: Settings, **extra: str) -> dict[str, str]:
    """The environment for a child process: this one's, `settings` that must reach the child, and `extra`."""
    chosen = {"OVERTONE_HOME": str(settings.home), "API_HOST": settings.api_host, "API_PORT": str(settings.api_port)}
    return {**os.environ, **chosen, **extra}


def set_default_environment(**values: str) -> None:
    """Give the libraries and child processes of this process `values` in their environment, where nobody set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def env_example() -> str:
    """The text of `.env.example`: every variable, its meaning and its default, all commented out."""
    lines = [
        "# Settings of Overtone. Copy to .env and uncomment what you change; the environment wins over this file.",
        "",
    ]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default is None else ",".join(default) if isinstance(default, tuple) else str(default)
        lines += [f"# {field.description}", f"# {name.upper()}={shown}", ""]
    return "\n".join(lines)
