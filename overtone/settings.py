"""The settings of a process: the only code that reads the environment.

An entry point calls `load_settings()` once and passes the result down. Sources, first wins: the environment, the
file `.env` in the working directory, for a secret the file that `<NAME>_FILE` names and the stores of `SECRETS_FROM`,
the defaults here. Secrets from files and stores may change while the process runs: `overtone.rotation` follows them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from overtone.errors import ConfigurationError, UnauthorizedError
from overtone.secrets import SecretStore, check_address, open_stores, read_file


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


def _jwks_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in {"127.0.0.1", "::1", "localhost"}):
        raise ValueError("must be an https:// address")
    return value


def _long_secret(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value().encode()) < 32:
        raise ValueError("must be at least 32 bytes long")
    return value


_JOB_OF_RAY = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where the secrets of one `Settings` come from."""

    given: frozenset[str] = frozenset()
    """Names of those that the environment, `.env` or the caller gave: they stay as they are."""
    files: Mapping[str, Path] = dataclass_field(default_factory=dict)


Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "HS256", "HS384", "HS512"
]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
WantedEngine = Literal["auto", "onnx-cpu", "onnx-cuda", "onnx-tensorrt", "torch"]


class _Variables(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
    )


class Settings(_Variables):
    """Every environment variable the product reads, with its unit, range and default."""

    # --- where things are kept
    overtone_home: Path = Field(
        Path("~/.overtone"), description="Folder of all local state: key, database, logs. A path."
    )

    # --- secrets
    secrets_from: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Where secrets are kept that are set nowhere else, comma-separated, the first that has one wins:"
        " file:///FOLDER, aws://NAME?region=REGION, vault://HOST:PORT/MOUNT/PATH?role=ROLE. Unset: nowhere.",
    )
    secrets_refresh_s: int = Field(
        60,
        ge=1,
        le=86_400,
        description="Seconds after which a process that runs reads secrets from files and stores again. 1 to 86400.",
    )
    vault_token: SecretStr | None = Field(
        None, description="Token for vault:// addresses without a role. Unset: the role signs in, by its pod."
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
        None,
        description="redis:// address of what processes share: counts of rate limits, the queue of jobs. Unset: in"
        " process and in files.",
    )

    # --- retention
    retention_posts_months: int = Field(
        6, ge=0, le=1200, description="Whole months that retention keeps posts. 0 to 1200; 0: for ever."
    )
    retention_predictions_months: int = Field(
        12, ge=0, le=1200, description="Whole months that retention keeps predictions. 0 to 1200; 0: for ever."
    )
    archive_url: str | None = Field(
        None,
        min_length=1,
        description="Where retention keeps months as Parquet before it drops them: a folder, s3:// or gs://."
        " Unset: nowhere.",
    )

    # --- erasure
    erasure_signing_key: SecretStr | None = Field(
        None,
        description="Ed25519 key that signs erasure receipts: 32 bytes in base64. Unset: OVERTONE_HOME/erasure_key,"
        " made when first needed.",
    )
    erasure_folders: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="More folders whose files hold posts, comma-separated: erasures look through them, as through"
        " OVERTONE_HOME/snapshots and OVERTONE_HOME/jobs.",
    )

    # --- jobs
    jobs_folder: Path | None = Field(
        None,
        description="Folder of uploads and results of jobs, which API and consumers share. A path."
        " Unset: OVERTONE_HOME/jobs.",
    )
    jobs_max_mib: int = Field(
        4096, ge=1, le=1_048_576, description="Largest upload of a job, unpacked, in MiB. 1 to 1048576."
    )
    jobs_max_texts: int = Field(10_000_000, ge=1, le=1_000_000_000, description="Most texts of a job. 1 to 1000000000.")
    jobs_max_open: int = Field(
        100, ge=1, le=100_000, description="Most jobs of a key that are under way at once. 1 to 100000."
    )
    job_consumers: int = Field(
        1, ge=0, le=64, description="Processes of `overtone up` that work on jobs. 0 to 64; 0: jobs wait."
    )
    retention_jobs_days: int = Field(
        7, ge=0, le=3650, description="Days that finished jobs and their results are kept. 0 to 3650; 0: for ever."
    )

    # --- tracking of training runs
    mlflow_tracking_uri: str | None = Field(
        None,
        description="MLflow server or store of training runs and bundles. Unset: SQLite and a folder in OVERTONE_HOME.",
    )
    mlflow_experiment_name: str = Field(
        "overtone", min_length=1, max_length=200, description="MLflow experiment. 1 to 200 characters."
    )
    mlflow_model_name: str = Field(
        "overtone",
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="Registered model whose versions are the bundles. 1 to 200 letters, digits, dots, dashes, lines.",
    )
    wandb_api_key: SecretStr | None = Field(
        None, description="Weights & Biases key: metrics of training runs go there too. Needs the package wandb."
    )
    wandb_project: str = Field(
        "overtone",
        min_length=1,
        max_length=128,
        description="Weights & Biases project. 1 to 128 characters.",
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
    allow_training_on_x_content: bool = Field(
        False,
        description="Whether feedback on posts from X is trained on: only with an agreement with X that allows it."
        " true or false.",
    )
    min_samples_for_retrain: int = Field(
        1000,
        ge=1,
        le=10_000_000,
        description="New labels after which retraining is due. 1 to 10000000.",
    )
    retrain_interval_hours: int = Field(
        168,
        ge=1,
        le=8760,
        description="Hours since the last run after which retraining is due, if there is a new label. 1 to 8760.",
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
    limit_requests_per_minute: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Requests a minute of a key that sets no limit of its own. 0 to 10000000; 0: no limit.",
    )
    limit_texts_per_minute: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="Texts a minute of a key that sets no limit of its own. 0 to 1000000000; 0: no limit.",
    )
    limit_texts_per_day: int = Field(
        0,
        ge=0,
        le=1_000_000_000_000,
        description="Texts a day of a key that sets no limit of its own. 0 to 1000000000000; 0: no limit.",
    )
    jwt_issuer: str | None = Field(
        None, min_length=1, max_length=1000, description="Claim `iss` that tokens must have. Needed by JWT_JWKS_URL."
    )
    jwt_audience: str | None = Field(
        None, min_length=1, max_length=1000, description="Claim `aud` that tokens must have. Needed by JWT_JWKS_URL."
    )
    jwt_jwks_url: Annotated[str, AfterValidator(_jwks_url)] | None = Field(
        None,
        description="Where the public keys of an identity provider are: https, or http on loopback, with JWT_ISSUER and"
        " JWT_AUDIENCE set. Unset: no tokens signed by RSA or EC keys.",
    )
    jwt_secret: Annotated[SecretStr, AfterValidator(_long_secret)] | None = Field(
        None, description="Secret of tokens signed by HS256. At least 32 bytes. Unset: no such tokens."
    )
    jwt_secret_previous: Annotated[SecretStr, AfterValidator(_long_secret)] | None = Field(
        None, description="What JWT_SECRET was before: its tokens are taken for as long as this is set. Unset: none."
    )
    jwt_algorithms: Annotated[tuple[Algorithm, ...], NoDecode] = Field(
        ("RS256", "ES256", "HS256"),
        min_length=1,
        description="Signatures that are taken, comma-separated, of RS256, RS384, RS512, PS256, PS384, PS512, ES256,"
        " ES384, ES512, HS256, HS384, HS512.",
    )
    jwt_scope_claim: str = Field(
        "scope", min_length=1, max_length=200, description="Claim with a token's scopes: a list, or words in a string."
    )
    jwt_leeway_s: int = Field(
        30, ge=0, le=300, description="Seconds by which clocks may differ when a token's times are checked. 0 to 300."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins that browsers may call from: comma-separated http(s) origins, or * for any. Unset: none.",
    )
    bundle: Path | None = Field(
        None, description="Folder of the model bundle to serve. Unset: the bundle in the package."
    )
    engine: WantedEngine = Field(
        "auto",
        description="What runs the model: auto, onnx-cpu, onnx-cuda, onnx-tensorrt or torch. auto: CUDA where there is "
        "a device and the bundle is not int8, else the CPU; not TensorRT, which builds for minutes at the first load; "
        "not torch, which needs the extra `torch` and a bundle exported with torch weights.",
    )
    serve_replicas: int | None = Field(
        None, ge=1, le=1024, description="Serving replicas, one thread each. 1 to 1024. Default: one a core, at most 8."
    )

    cache_entries: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Texts whose scores each replica remembers, 350 bytes each; with REDIS_URL they are in Redis, "
        "which bounds their number itself. 0 to 10000000; 0 for no cache.",
    )
    cache_ttl_s: int = Field(
        3600, ge=1, le=2_592_000, description="Seconds that scores stay in Redis. 1 to 2592000 (30 days)."
    )

    # --- logs, metrics and traces
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["json", "console"] = Field("json", description="json or console.")
    otel_exporter_otlp_endpoint: HttpUrl | None = Field(
        None, description="OpenTelemetry collector that traces are sent to by OTLP over HTTP. Unset: no traces."
    )
    otel_traces_sampler_arg: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of requests traced where the caller has not decided. 0 to 1.",
    )
    prometheus_multiproc_dir: Path | None = Field(
        None,
        description="Folder through which the processes of one machine add up their metrics. Set by `overtone up`.",
    )

    _sources: _Sources = PrivateAttr(default_factory=_Sources)

    @property
    def may_change(self) -> frozenset[str]:
        """Names of the secrets that may change while this process runs, because files or stores hold them."""
        kept = secret_names() if self.secrets_from else self._sources.files
        return frozenset(kept) - self._sources.given

    @property
    def home(self) -> Path:
        """`overtone_home`, absolute, with `~` resolved."""
        return self.overtone_home.expanduser().absolute()

    @property
    def api_url(self) -> str:
        """Where programs and people of this machine reach the API."""
        host = _ANY_ADDRESS.get(self.api_host, self.api_host)
        return f"http://[{host}]:{self.api_port}" if ":" in host else f"http://{host}:{self.api_port}"

    def read_api_key(self) -> str:
        """The key by which the installation's own programs call the API: the setting's, or the one in the home.

        Raises:
            UnauthorizedError: there is neither.
        """
        if self.overtone_api_key is not None:
            return self.overtone_api_key.get_secret_value()
        path = self.home / "api_key"
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise UnauthorizedError(f"no API key: OVERTONE_API_KEY is unset and {path} cannot be read") from error

    @property
    def jobs_path(self) -> Path:
        """`jobs_folder`, or the one in the home."""
        return self.jobs_folder.expanduser().absolute() if self.jobs_folder else self.home / "jobs"

    @property
    def tensorrt_folder(self) -> Path:
        """Where TensorRT keeps what it builds."""
        return self.home / "tensorrt"

    @property
    def replicas(self) -> int:
        """`serve_replicas`, or one a core of this machine, at most 8."""
        return self.serve_replicas or min(8, os.cpu_count() or 1)

    @field_validator("jwt_jwks_url")
    @classmethod
    def _need_issuer(cls, value: str | None, info: ValidationInfo) -> str | None:
        # A provider signs tokens for many services with the same keys.
        if value is not None and not (info.data.get("jwt_issuer") and info.data.get("jwt_audience")):
            raise ValueError("needs JWT_ISSUER and JWT_AUDIENCE beside it")
        return value

    @field_validator("jwt_algorithms", "erasure_folders", "secrets_from", mode="before")
    @classmethod
    def _split_words(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("secrets_from")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_address(address) for address in value)

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
        EnvironmentProblemError: the library of a store of secrets is not installed.
        UnavailableError: a store of secrets does not answer.
    """
    with _explained():
        settings = Settings(**overrides)
        files = _secret_files()(**{"_env_file": overrides["_env_file"]} if "_env_file" in overrides else {})
    settings._sources = _sources_of(settings, files)
    if not settings.may_change:
        return settings
    return read_secrets(settings, open_stores(settings.secrets_from))


def read_secrets(settings: Settings, stores: Sequence[SecretStore]) -> Settings:
    """`settings` with the secrets that files and `stores` hold as they are now. Blocks.

    Raises:
        ConfigurationError: a secret cannot be read, or is not what it must be.
        UnavailableError: a store does not answer.
    """
    found = {name: read_file(path) for name, path in settings._sources.files.items()}
    token = found.get("vault_token") or (settings.vault_token.get_secret_value() if settings.vault_token else None)
    for store in stores:
        found = store.read(token) | found
    checked: dict[str, Any] = {}
    for name in settings.may_change:
        with _explained(name):
            checked[name] = _adapter(name).validate_python(found.get(name) or None)
    return settings.model_copy(update=checked)


@cache
def secret_names() -> frozenset[str]:
    """The names of the settings that are secrets."""
    return frozenset(name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation))


@cache
def _secret_files() -> type[BaseSettings]:
    """The variables that name files: DATABASE_URL_FILE for DATABASE_URL, and so on."""
    fields: dict[str, Any] = {f"{name}_file": (Path | None, None) for name in sorted(secret_names())}
    return create_model("_SecretFiles", __base__=_Variables, **fields)


def _sources_of(settings: Settings, files: BaseSettings) -> _Sources:
    given = settings.model_fields_set & secret_names()
    named = {name.removesuffix("_file"): path for name, path in files if path is not None}
    twice = sorted(given & set(named))
    if twice:
        names = (f"{name.upper()} and {name.upper()}_FILE are both set: keep one." for name in twice)
        raise ConfigurationError("\n".join(names))
    return _Sources(frozenset(given), named)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    annotation: Any = Settings.model_fields[name].annotation
    return TypeAdapter(annotation)


@contextmanager
def _explained(field: str | None = None) -> Iterator[None]:
    """Raise what pydantic says, of `field` alone if that is given, as an error for people."""
    try:
        yield
    except ValidationError as error:
        lines = [
            _explain(field or (str(item["loc"][0]) if item["loc"] else "settings"), item["msg"])
            for item in error.errors()
        ]
        raise ConfigurationError("\n".join(lines)) from None


def _explain(name: str, problem: str) -> str:
    field: FieldInfo | None = Settings.model_fields.get(name)
    allowed = f" Allowed: {field.description}" if field and field.description else ""
    return f"{name.upper()}: {problem}.{allowed}"


def environment_for(settings: Settings, **extra: str) -> dict[str, str]:
    """The environment for a child process: this one's, `settings` that must reach the child, and `extra`.

    Within a job of Ray's job server, children do not belong to the job: what they deploy would else be given the job's
    working folder, and running replicas be replaced for that.
    """
    inherited = {name: value for name, value in os.environ.items() if name != _JOB_OF_RAY}
    chosen = {"OVERTONE_HOME": str(settings.home), "API_HOST": settings.api_host, "API_PORT": str(settings.api_port)}
    if settings.secrets_from:
        chosen["SECRETS_FROM"] = ",".join(settings.secrets_from)
    for name, path in settings._sources.files.items():
        chosen[f"{name.upper()}_FILE"] = str(path.absolute())
    return {**inherited, **chosen, **extra}


def set_default_environment(**values: str) -> None:
    """Give the libraries and child processes of this process `values` in their environment, where nobody set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def env_example() -> str:
    """The text of `.env.example`: every variable, its meaning and its default, all commented out."""
    lines = [
        "# Settings of Overtone. Copy to .env and uncomment what you change; the environment wins over this file.",
        "# A secret may be kept in a file instead, which <NAME>_FILE names, such as DATABASE_URL_FILE=/run/secrets/db.",
        "",
    ]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default is None else ",".join(default) if isinstance(default, tuple) else str(default)
        lines += [f"# {field.description}", f"# {name.upper()}={shown}", ""]
    return "\n".join(lines)
