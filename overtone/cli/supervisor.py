"""The supervisor: starts the parts of the stack in order, starts again what dies, and stops all of it."""

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx

from overtone.cli.children import Child, Driver, ray_driver, ray_head, simulator
from overtone.cli.cleanup import stop_home, stop_ray
from overtone.cli.draining import drain_api
from overtone.cli.figures import Totals, await_drained
from overtone.cli.plan import Plan
from overtone.cli.processes import MARK
from overtone.cli.rates import RateMeter
from overtone.cli.reports import PAGE, Report, curl_line
from overtone.cli.state import PartRecord, ProcessRecord, RunFolder, RunState
from overtone.db import keys
from overtone.db.database import Database
from overtone.db.migrate import upgrade
from overtone.errors import OvertoneError, UnavailableError
from overtone.logging import get_logger
from overtone.ports import LOOPBACK

SIGN_IN_TTL_S = 15 * 60.0

_STEP_S = 0.25
_RATES_EVERY_S = 2.0
_DEPLOY_TIMEOUT_S = 180.0
_DRAIN_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 15.0
"""How long a stop waits for the answers of requests under way."""
_SILENT_S = 60.0
"""An API without any answer for this long is started again together with Ray."""
_MAX_RETRY_S = 30.0

_log = get_logger()


class Stopped(Exception):  # noqa: N818  (it ends a wait; nothing failed)
    """Someone asked for the end."""


class Guard:
    """The process that stops everything should this one be killed; see `overtone.cli.guard`."""

    def __init__(self, plan: Plan) -> None:
        reading, self._writing = os.pipe()
        command = [sys.executable, "-m", "overtone.cli.guard", str(reading), str(plan.home), plan.run_id]
        plan.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (plan.logs / "guard.log").open("ab") as log:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={name: value for name, value in plan.environment.items() if name != MARK},
                pass_fds=(reading,),
                start_new_session=True,
            )
        os.close(reading)

    @property
    def is_alive(self) -> bool:
        """Whether it still watches."""
        return self._popen.poll() is None

    def dismiss(self) -> None:
        """Tell it that all is in order."""
        with suppress(OSError):
            os.write(self._writing, b".")
        os.close(self._writing)
        self._popen.wait()


class Supervisor:
    """Owns one run of the stack. Call `start`, then `watch`, and in any case `stop`, on one thread.

    `stop_asked` is looked at wherever something is waited for; `start` and `watch` raise `Stopped` when it is set.
    """

    def __init__(self, plan: Plan, folder: RunFolder, report: Report, stop_asked: threading.Event) -> None:
        self._plan = plan
        self._folder = folder
        self._report = report
        self._stop_asked = stop_asked
        self._state = RunState(
            run_id=plan.run_id,
            supervisor=ProcessRecord.of(os.getpid()),
            started_at=time.time(),
            source=plan.posts_source,
        )
        self._guard: Guard | None = None
        self._ray: Child | None = None
        self._simulator: Child | None = None
        self._is_database_up = False
        self._is_ingesting = False
        self._meter = RateMeter(plan.api_url)
        self._answered_at = time.monotonic()
        self._began = time.monotonic()

    @property
    def addresses(self) -> dict[str, str]:
        """Where everything is, by title."""
        return self._state.addresses

    def start(self) -> None:
        """Start every part.

        Raises:
            OvertoneError: a part cannot be started; the message says why.
        """
        self._prepare()
        with ThreadPoolExecutor(1) as pool:
            database = pool.submit(self._start_database)
            self._launch_ray(database)
        self._finish_start()

    def watch(self, seconds: float | None) -> None:
        """Keep the stack up for `seconds`, or until it is asked to stop."""
        deadline = None if seconds is None else time.monotonic() + seconds
        look_at = time.monotonic()
        while deadline is None or time.monotonic() < deadline:
            self._tick()
            self._restart_what_died()
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + _RATES_EVERY_S
                self._look()
            self._stop_asked.wait(_STEP_S)

    def finish(self) -> Totals:
        """Stop what brings in posts, wait until every stored post has its prediction, and count.

        Raises:
            UnavailableError: predictions did not catch up within two minutes.
        """
        self._report.event("source.stopping", "Stopping the source of posts; waiting for the last predictions.")
        self._stop_source()
        return asyncio.run(await_drained(self._plan, _DRAIN_TIMEOUT_S, self._tick))

    def totals(self) -> Totals | None:
        """What is stored now; None when the database cannot say."""
        if not self._is_database_up:
            return None
        with suppress(OvertoneError):
            return asyncio.run(await_drained(self._plan, 0.0, lambda: None))
        return None

    def wind_down(self) -> None:
        """Stop the source and the ingestion, which stores and classifies what it has."""
        self._save(phase="stopping")
        self._stop_simulator()
        if self._is_ingesting and self._ray is not None and self._ray.exit_status is None:
            self._drain_ingestion()

    def stop(self) -> None:
        """Stop every process of this run, in order: source, ingestion, API, Serve and Ray, database."""
        self.wind_down()
        if not drain_api(self._plan.folder, _ANSWER_TIMEOUT_S):
            _log.warning("api.not_drained", waited_s=_ANSWER_TIMEOUT_S)
        self._meter.close()
        try:
            left = stop_home(self._plan.home, self._folder)
        finally:
            if self._guard:
                self._guard.dismiss()
        if left:
            raise UnavailableError(f"These processes could not be stopped: {', '.join(map(str, left))}.")

    # --- starting

    def _prepare(self) -> None:
        shutil.rmtree(self._folder.metrics, ignore_errors=True)
        self._folder.metrics.mkdir(parents=True, mode=0o700)
        self._plan.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Ray opens its folder to every user; the one above it keeps them out.
        self._plan.ray_folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._plan.ray_folder.parent.chmod(0o700)
        self._folder.save(self._state)
        self._guard = Guard(self._plan)
        secret_file(self._plan.ray_token_file, lambda: secrets.token_hex(32))

    def _start_database(self) -> None:
        began = time.monotonic()
        plan = self._plan
        if plan.postgres:
            plan.postgres.start()
        asyncio.run(self._prepare_database())
        address = f"embedded, data in {plan.home / 'postgres'}" if plan.postgres else "the server of DATABASE_URL"
        self._note_postgres(address, time.monotonic() - began)
        self._is_database_up = True

    async def _prepare_database(self) -> None:
        url = self._plan.database_url
        await upgrade(url)
        secret = secret_file(self._plan.key_file, keys.new_secret)
        db = await Database.open(url, max_size=1, application_name="overtone-up")
        try:
            await keys.import_key(db, "first key", secret, keys.SCOPES)
        finally:
            await db.close()

    def _launch_ray(self, database: "Future[None] | None" = None) -> None:
        plan, began = self._plan, time.monotonic()
        cpus = max(os.cpu_count() or 1, plan.settings.serve_replicas or 0)
        self._ray = ray_head(plan, cpus)
        driver = ray_driver(plan)
        try:
            self._await(database)
            self._await_driver(driver, "connect")
            self._note("ray", self._ray_address(), began, self._ray)
            if plan.simulates and self._simulator is None:
                self._simulator = simulator(plan)
            began = time.monotonic()
            driver.order("serve")
            self._await_driver(driver, "serve")
            self._await_ready()
            self._note("serve", plan.api_url, began)
            if self._simulator is not None:
                self._note_simulator()
            began = time.monotonic()
            driver.order("ingest")
            self._await_driver(driver, "ingest")
            self._is_ingesting = True
            self._note("ingest", f"reads {plan.posts_source}", began)
            began = time.monotonic()
            driver.order("jobs")
            self._await_driver(driver, "jobs")
            if plan.settings.job_consumers:
                self._note("jobs", plan.jobs_queue, began)
        finally:
            driver.close()
        self._answered_at = time.monotonic()

    def _await(self, work: "Future[None] | None") -> None:
        while work is not None and not work.done():
            self._tick()
            assert self._ray is not None
            self._ray.require_alive()
            self._stop_asked.wait(0.05)
        if work is not None:
            work.result()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + 60.0
        while not self._meter.is_ready():
            self._tick()
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self._plan.api_url}/ready does not say 200. See the logs of Ray Serve.")
            self._stop_asked.wait(0.1)

    def _finish_start(self) -> None:
        plan = self._plan
        self._save(phase="ready", addresses=self._find_addresses())
        link = {PAGE: asyncio.run(sign_in_link(plan.database_url, plan.api_url))}
        self._report.ready(link | self.addresses, plan.posts_source, time.monotonic() - self._began)

    def _find_addresses(self) -> dict[str, str]:
        plan = self._plan
        curl = curl_line(plan.api_url, plan.settings.api_key_header, plan.key_file)
        return {
            "Try it": curl,
            "API": plan.api_url,
            "API docs": f"{plan.api_url}/docs",
            "API key": f"in {plan.key_file}",
            "Ray": f"{self._ray_address()} (token in {plan.ray_token_file})",
            "Logs": f"{plan.logs}, {plan.ray_folder / 'session_latest' / 'logs'}",
        }

    def _ray_address(self) -> str:
        ports = self._plan.ports
        if self._plan.has_dashboard:
            return f"http://{LOOPBACK}:{ports.dashboard}"
        return f"{LOOPBACK}:{ports.gcs}, without dashboard"

    def _await_driver(self, driver: Driver, word: str) -> None:
        driver.await_answer(word, _DEPLOY_TIMEOUT_S, self._tick_start)

    def _note(self, name: str, address: str, began: float, child: Child | None = None) -> None:
        seconds = time.monotonic() - began
        self._record(PartRecord(name, address, child.record if child else None, seconds))

    def _note_simulator(self) -> None:
        assert self._simulator is not None
        rate, url = float(self._plan.environment["SIMULATOR_RATE"]), self._plan.environment["X_API_BASE_URL"]
        self._record(PartRecord("simulator", f"{rate:g} posts/s at {url}", self._simulator.record))

    def _note_postgres(self, address: str, seconds: float) -> None:
        pid = self._plan.postgres.pid if self._plan.postgres else None
        self._record(PartRecord("postgres", address, ProcessRecord.of(pid) if pid else None, seconds))

    def _record(self, part: PartRecord) -> None:
        self._state = self._state.with_part(part)
        self._folder.save(self._state)
        self._report.started(part)

    def _save(self, *, phase: str, addresses: dict[str, str] | None = None) -> None:
        chosen = self._state.addresses if addresses is None else addresses
        self._state = replace(self._state, phase=phase, addresses=chosen)
        self._folder.save(self._state)

    # --- watching

    def _tick_start(self) -> None:
        self._tick()
        assert self._ray is not None
        self._ray.require_alive()

    def _tick(self) -> None:
        """Raise `Stopped` if asked to; start again what needs nothing but itself."""
        if self._stop_asked.is_set():
            raise Stopped
        if self._is_database_up and self._plan.postgres and self._plan.postgres.restart_if_dead():
            self._report.event("postgres.restarted", "PostgreSQL had died and was started again.")
            self._note_postgres(f"embedded, data in {self._plan.home / 'postgres'}", 0.0)
        if self._simulator is not None and self._simulator.exit_status is not None:
            self._report.event("simulator.restarted", "The simulator had died and was started again.")
            self._simulator = simulator(self._plan)
            self._note_simulator()

    def _restart_what_died(self) -> None:
        if self._guard is not None and not self._guard.is_alive:
            self._guard = Guard(self._plan)
        assert self._ray is not None
        if self._ray.exit_status is not None:
            self._restart_ray("Ray had died")
        elif time.monotonic() - self._answered_at > _SILENT_S:
            self._restart_ray(f"The API had not answered for {_SILENT_S:.0f} s")

    def _restart_ray(self, reason: str) -> None:
        wait_s = 1.0
        while True:
            self._report.event("ray.restarting", f"{reason}: starting Ray, Serve and the ingestion again.")
            stop_ray(self._plan.home)
            try:
                self._launch_ray()
                return
            except OvertoneError as error:
                reason = f"That did not work ({error.message.splitlines()[0]})"
            self._stop_asked.wait(wait_s)
            self._tick()
            wait_s = min(wait_s * 2, _MAX_RETRY_S)

    def _look(self) -> None:
        rates = self._meter.look()
        if rates is not None:
            self._answered_at = time.monotonic()
            self._report.rates(rates)
        elif self._meter.is_answering():
            self._answered_at = time.monotonic()

    # --- stopping

    def _stop_source(self) -> None:
        if not self._plan.simulates:
            self._drain_ingestion()
            return
        # A silent simulator still hands out what it published, which one that was killed would take with it.
        url = self._plan.environment["X_API_BASE_URL"]
        try:
            httpx.post(f"{url}/simulator/faults", json={"kind": "silence"}, timeout=5.0, trust_env=False)
        except httpx.HTTPError:
            self._stop_simulator()

    def _stop_simulator(self) -> None:
        if self._simulator is not None:
            chosen, self._simulator = self._simulator, None
            chosen.stop(3.0)

    def _drain_ingestion(self) -> None:
        self._is_ingesting = False
        driver = ray_driver(self._plan)
        try:
            driver.await_answer("connect", 15.0)
            driver.order("stop-ingest")
            driver.await_answer("stop-ingest", 20.0)
        except OvertoneError as error:
            _log.warning("ingest.not_drained", code=error.code)
        finally:
            driver.close()


def secret_file(path: Path, make: Callable[[], str]) -> str:
    """The secret in `path`, readable by its owner alone; made with `make` if there is none yet."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_text(encoding="utf-8").strip()
        if found:
            path.chmod(0o600)
            return found
        path.unlink()
        return secret_file(path, make)
    secret = make()
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{secret}\n")
    return secret


async def sign_in_link(database_url: str, api_url: str) -> str:
    """An address that signs one browser in, once, within a quarter of an hour."""
    db = await Database.open(database_url, max_size=1, application_name="overtone-cli")
    try:
        return f"{api_url}/sign-in?token={await keys.create_sign_in(db, SIGN_IN_TTL_S)}"
    finally:
        await db.close()
