"""What a run of the stack will look like, decided before anything is started: addresses, ports, environment."""

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ingest.options import load_options
from overtone.cli.cleanup import embedded_postgres, ray_folder
from overtone.cli.processes import MARK, mark_of
from overtone.db.embedded import EmbeddedPostgres
from overtone.errors import EnvironmentProblemError
from overtone.ports import LOOPBACK, free_ports
from overtone.settings import Settings, environment_for
from serve.environment import is_loopback, runtime_folder, serve_environment

DASHBOARD_PORT = 8265
_DASHBOARD_CORES = 4
"""With fewer, the dashboard would take longer to start than everything else together."""
_RULES = Path("configs/ingest/rules.yaml")
"""Read with posts from X, if it is there and no other file is named."""
_SIMULATOR_TOKEN = "simulator"


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports on loopback, free when they were chosen."""

    gcs: int
    client: int
    dashboard: int
    agent: int
    simulator: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    settings: Settings
    home: Path
    run_id: str
    folder: Path
    """For sockets and for Ray: short, under the system's temporary folder."""
    ports: Ports
    database_url: str
    postgres: EmbeddedPostgres | None
    """None with a DATABASE_URL of the user's."""
    simulates: bool
    """Whether posts come from the simulator."""
    ingest_files: tuple[Path, ...]
    """YAML files with options of the ingestion, a later one wins; none for what suits the source."""
    has_dashboard: bool
    """Whether Ray's dashboard runs: ten more processes."""
    environment: dict[str, str]
    """Of every process but PostgreSQL, less the mark."""

    @property
    def api_url(self) -> str:
        """Where people of this machine reach the API."""
        return self.settings.api_url

    @property
    def ray_folder(self) -> Path:
        """Ray's sessions, with the logs of what runs on Ray."""
        return ray_folder(self.home)

    @property
    def logs(self) -> Path:
        """Logs of what is not Ray."""
        return self.home / "logs"

    @property
    def metrics(self) -> Path:
        """Through which the processes of the stack add up their metrics."""
        return self.home / "run" / "metrics"

    @property
    def key_file(self) -> Path:
        """The API key of this home."""
        return self.home / "api_key"

    @property
    def ray_token_file(self) -> Path:
        """The token of Ray's own services."""
        return self.home / "ray_token"

    @property
    def jobs_queue(self) -> str:
        """Who works on jobs and where these wait, for people."""
        where = "Redis" if self.settings.redis_url else f"{self.home / 'broker'}"
        number = self.settings.job_consumers
        return f"{number} consumer{'s' if number > 1 else ''}, queue in {where}"

    @property
    def posts_source(self) -> str:
        """Where posts come from, for people."""
        return "simulator" if self.simulates else self.settings.x_api_base_url

    def environment_of(self, part: str) -> dict[str, str]:
        """The environment of `part`, with its mark."""
        return {**self.environment, MARK: mark_of(self.home, self.run_id, part)}


def make_plan(
    settings: Settings,
    *,
    rate: float | None = None,
    has_dashboard: bool | None = None,
    ingest_files: Sequence[Path] = (),
) -> Plan:
    """Decide everything for one run of the stack.

    Raises:
        ConfigurationError: an option of the ingestion is wrong.
        EnvironmentProblemError: the API port is taken, or a folder cannot be used.
    """
    home = settings.home
    require_free_port(settings.api_host, settings.api_port)
    folder = runtime_folder(home)
    ports = Ports(*free_ports(5, prefer={2: DASHBOARD_PORT}))
    postgres = None if settings.database_url else embedded_postgres(home)
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    simulates = settings.twitter_bearer_token is None
    database_url = postgres.url if postgres else url
    files = tuple(path.absolute() for path in ingest_files)
    if not files and not simulates and _RULES.is_file():
        files = (_RULES.absolute(),)
    load_options(files)
    environment = environment_for(settings, **ray_variables(settings, home, folder))
    if "database_url" not in settings.may_change or postgres:
        environment["DATABASE_URL"] = database_url
    if simulates:
        environment["X_API_BASE_URL"] = f"http://{LOOPBACK}:{ports.simulator}"
        environment["TWITTER_BEARER_TOKEN"] = _SIMULATOR_TOKEN
        environment["SIMULATOR_RATE"] = str(rate or settings.simulator_rate)
    return Plan(
        settings=settings,
        home=home,
        run_id=secrets.token_hex(8),
        folder=folder,
        ports=ports,
        database_url=database_url,
        postgres=postgres,
        simulates=simulates,
        ingest_files=files,
        has_dashboard=(os.cpu_count() or 1) >= _DASHBOARD_CORES if has_dashboard is None else has_dashboard,
        environment=environment,
    )


def require_free_port(host: str, port: int) -> None:
    """Raise unless a server can listen on `host`:`port`.

    Raises:
        EnvironmentProblemError: the port is taken; the message says by whom, if that can be seen.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken_by = port_owner(port)
            raise EnvironmentProblemError(
                f"The API cannot listen on {host}:{port}: {error.strerror}{taken_by}. "
                "Stop what uses the port, or choose another with API_PORT."
            ) from error


def port_owner(port: int) -> str:
    """` (used by NAME, process PID)` for the process that listens on `port`, empty if that cannot be seen."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" (used by {psutil.Process(connection.pid).name()}, process {connection.pid})"
    except psutil.Error:
        pass
    return ""


def ray_variables(settings: Settings, home: Path, folder: Path) -> dict[str, str]:
    """What every process of Ray, and every process that talks to it, must have in its environment."""
    variables = serve_environment(host=settings.api_host, folder=folder)
    if not is_loopback(settings.api_host):
        # An API that is open to the network does not open Ray to it: only HAProxy and the replicas listen there.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return variables | {
        # Ray runs any code it is sent, so other users of the machine must not be able to send it some.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "ray_token"),
    }
