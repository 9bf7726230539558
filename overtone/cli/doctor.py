"""`overtone doctor`: what on this machine or in these settings is in the way, and how to mend it."""

import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape

from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.cli.cleanup import embedded_postgres
from overtone.cli.exits import EXIT_CODES
from overtone.cli.plan import DASHBOARD_PORT, port_owner, require_free_port
from overtone.cli.state import RunFolder
from overtone.db.embedded import find_binaries
from overtone.engine import choose_engine, classify_sorted, is_slow, open_engine, usable_providers
from overtone.errors import EnvironmentProblemError, OvertoneError
from overtone.hardware import CPU_FEATURES, read_cpu_features
from overtone.ports import LOOPBACK, free_ports
from overtone.settings import Settings, load_settings
from overtone.torch_engine import Target, is_installed, usable_target
from serve.environment import find_haproxy, is_loopback, runtime_folder

Level = Literal["ok", "warning", "problem"]

_GIB = 1024**3
_MIN_FREE_DISK = 2 * _GIB
_MIN_MEMORY = 3 * _GIB
_MIN_SHM = 160 * 1024**2
_BENCH_S = 1.0
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Both install the module `onnxruntime`, so each can stand in for the other."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What to do; empty when all is well."""


Check = Callable[[Settings], Iterator[Finding]]


def doctor(console: Console, *, as_json: bool, bench: bool = False) -> int:
    """Show all findings; 0 when none is a problem, else the code of `EnvironmentProblemError`."""
    findings = examine(bench_s=_BENCH_S if bench else 0.0)
    if as_json:
        console.print_json(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            _show(finding, console)
    has_problem = any(finding.level == "problem" for finding in findings)
    return EXIT_CODES[EnvironmentProblemError] if has_problem else 0


def examine(*, bench_s: float = 0.0) -> list[Finding]:
    """Every finding; a check that fails by itself is a finding too. The engine is run for `bench_s` seconds, if any."""
    findings = [_python()]
    try:
        settings = load_settings()
    except OvertoneError as error:
        return [*findings, Finding("settings", "problem", error.message, "Correct these variables.")]
    findings.append(Finding("settings", "ok", "every variable is in its range"))
    checks: dict[str, Check] = {
        "packages": _packages,
        "machine": _machine,
        "folders": _folders,
        "ports": _ports,
        "programs": _programs,
        "bundle": _bundle,
        "engine": _engine,
        "posts": _source,
    }
    if bench_s:
        checks["bench"] = partial(_bench, seconds=bench_s)
    for name, check in checks.items():
        try:
            findings += check(settings)
        except (OvertoneError, OSError, psutil.Error) as error:
            advice = "Do what it says, then run `overtone doctor` again."
            findings.append(Finding(name, "problem", str(error) or type(error).__name__, advice))
    return findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", version)
    return Finding("python", "problem", version, "Use Python 3.11, 3.12 or 3.13.")


def _packages(_settings: Settings) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    missing = []
    for line in metadata.requires("overtone") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version_of(requirement.name)
        if installed is None and requirement.name in _RUNTIMES:
            installed = next(filter(None, map(_version_of, _RUNTIMES)), None)
        if installed is None:
            missing.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            missing.append(f"{requirement.name} is {installed}, needed is {requirement.specifier}")
    if missing:
        yield Finding("packages", "problem", "; ".join(missing), "Run `make up` again, or `pip install -e .`.")
    else:
        yield Finding("packages", "ok", "all are there")


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine(settings: Settings) -> Iterator[Finding]:
    yield Finding("cores", "ok", f"{os.cpu_count()}")
    available = psutil.virtual_memory().available
    advice = "Close other programs, or set SERVE_REPLICAS=1." if available < _MIN_MEMORY else ""
    level: Level = "warning" if advice else "ok"
    yield Finding("memory", level, f"{available / _GIB:.1f} GiB available, 3 are needed", advice)
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    advice = "Free some space, or set OVERTONE_HOME to another disk." if free < _MIN_FREE_DISK else ""
    yield Finding("disk", "problem" if advice else "ok", f"{free / _GIB:.1f} GiB free at {place}, 2 are needed", advice)
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        advice = "Give the container more shared memory (docker run --shm-size=512m)." if free < _MIN_SHM else ""
        yield Finding("shared memory", "warning" if advice else "ok", f"{free / 1024**2:.0f} MiB free", advice)


def _folders(settings: Settings) -> Iterator[Finding]:
    home = settings.home
    if not home.exists():
        yield Finding("home", "ok", f"{home} will be made by the first `overtone up`")
        return
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("home", "problem", f"{home} cannot be written", "Change its owner, or set OVERTONE_HOME.")
        return
    yield Finding("home", "ok", str(home))
    for name in ("api_key", "ray_token"):
        path = home / name
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Finding(name, "problem", f"others may read {path}", f"Run: chmod 600 {path}")
    folder = runtime_folder(home)
    if folder.exists() and folder.stat().st_uid != os.getuid():
        yield Finding("runtime folder", "problem", f"{folder} belongs to another user", "Remove it.")


def _ports(settings: Settings) -> Iterator[Finding]:
    host, port = settings.api_host, settings.api_port
    state = RunFolder(settings.home).load()
    if state is not None and state.supervisor.alive() is not None:
        yield Finding("api port", "ok", f"{port}, used by Overtone, which is {state.phase}")
    else:
        try:
            require_free_port(host, port)
            yield Finding("api port", "ok", f"{port} is free")
        except EnvironmentProblemError as error:
            yield Finding("api port", "problem", error.message, f"Stop that, or run with API_PORT={free_ports(1)[0]}.")
        except socket.gaierror:
            yield Finding("api host", "problem", f"{host} is no address of this machine", "Correct API_HOST.")
        if free_ports(1, {0: DASHBOARD_PORT})[0] != DASHBOARD_PORT:
            owner = port_owner(DASHBOARD_PORT)
            yield Finding("dashboard port", "ok", f"{DASHBOARD_PORT} is taken{owner}; another will be chosen")
    if not is_loopback(host):
        advice = "Put a proxy with TLS in front: keys travel in the clear."
        yield Finding("api host", "warning", f"{host}: other machines can reach the API", advice)


def _programs(settings: Settings) -> Iterator[Finding]:
    haproxy = find_haproxy()
    if haproxy:
        yield Finding("haproxy", "ok", str(haproxy))
    else:
        advice = (
            "Install HAProxy 2.8 or later (macOS: brew install haproxy); without it Ray's own slower proxy is used."
        )
        yield Finding("haproxy", "warning", "not found", advice)
    if settings.database_url:
        yield Finding("postgres", "ok", "the server of DATABASE_URL; `overtone db check` looks at its tables")
    else:
        running = "runs" if embedded_postgres(settings.home).is_running() else "does not run now"
        yield Finding("postgres", "ok", f"embedded, {find_binaries()}, {running}")
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
    yield Finding("loopback", "ok", LOOPBACK)


def _bundle(settings: Settings) -> Iterator[Finding]:
    try:
        bundle = load_bundle(settings.bundle)
    except OvertoneError as error:
        yield Finding("bundle", "problem", error.message, "Correct BUNDLE, or unset it to use the one in the package.")
        return
    yield Finding("bundle", "ok", f"{bundle.version} in {bundle.path}")


def _engine(settings: Settings) -> Iterator[Finding]:
    yield runtime_finding({name: version for name in _RUNTIMES if (version := _version_of(name))})
    yield layout_finding(settings.replicas, os.cpu_count() or 1)
    bundle = _readable_bundle(settings)
    if bundle is None:
        return
    has_torch_form = bundle.torch is not None
    choice = choose_engine(settings.engine, usable_providers(), bundle.precision, has_torch_form=has_torch_form)
    yield Finding("engine", "ok", f"{choice.name}: {choice.reason}")
    if choice.name == "onnx-tensorrt":
        yield built_finding(settings.tensorrt_folder, bundle)
    if choice.name == "onnx-cpu":
        yield processor_finding(bundle, read_cpu_features())
    yield torch_finding(usable_target()) if choice.name == "torch" else other_finding(bundle)


def torch_finding(target: Target) -> Finding:
    """How torch runs a bundle for `target`."""
    found = f"{_version_of('torch')}, {target.precision} on {target.device}: {target.reason}"
    return Finding("torch", "ok", found)


def other_finding(bundle: Bundle) -> Finding:
    """Why torch does not run `bundle`, and whether it could."""
    why = "not asked for; auto never chooses it, as what a replica runs would depend on the packages it has"
    if bundle.torch is None:
        return Finding("torch", "ok", f"{why}. This bundle has no torch weights (export.torch: true adds them)")
    if not is_installed():
        return Finding("torch", "ok", f"{why}. This bundle has torch weights, but torch is not installed")
    return Finding("torch", "ok", f"{why}. ENGINE=torch would run this bundle")


def built_finding(folder: Path, bundle: Bundle) -> Finding:
    """Whether TensorRT has built something for `bundle` already, in `folder`."""
    if any(folder.glob(f"{bundle.version}-*/*.engine")):
        return Finding("tensorrt", "ok", f"an engine for {bundle.version} is kept in {folder}")
    advice = "The first load builds one, for minutes. Run: overtone doctor --bench, before it serves."
    return Finding("tensorrt", "warning", f"no engine for {bundle.version} in {folder}", advice)


def runtime_finding(versions: dict[str, str]) -> Finding:
    """What there is to say of the installed packages of ONNX Runtime, name to version."""
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(versions) < len(_RUNTIMES):
        # With none, the packages are a finding of their own.
        return Finding("onnx runtime", "ok", found or "not installed")
    advice = (
        "They install the same module, and the last one wins. Run: pip uninstall -y onnxruntime onnxruntime-gpu, "
        "then: pip install onnxruntime-gpu for a GPU, or onnxruntime for the CPU."
    )
    return Finding("onnx runtime", "warning", found, advice)


def layout_finding(replicas: int, cores: int) -> Finding:
    """Whether `replicas` of one thread each fit `cores`."""
    found = f"{replicas} replicas x 1 thread on {cores} cores"
    if replicas > cores:
        return Finding("layout", "warning", found, f"They take turns on the cores: set SERVE_REPLICAS={cores} or less.")
    return Finding("layout", "ok", found)


def processor_finding(bundle: Bundle, features: frozenset[str] | None) -> Finding:
    """Whether a processor with `features` has what `bundle` is made for."""
    if features is None:
        return Finding("processor", "ok", "its instruction sets are not known on this system")
    found = ", ".join(name for name in CPU_FEATURES if name in features) or "no instructions for int8"
    if is_slow(bundle.precision, features):
        advice = "int8 is slow without VNNI, AMX or dot products: compare a bundle in fp32 (export.precision: fp32)."
        return Finding("processor", "warning", found, advice)
    return Finding("processor", "ok", found)


def _bench(settings: Settings, seconds: float) -> Iterator[Finding]:
    bundle = _readable_bundle(settings)
    if bundle is None:
        return
    engine = open_engine(bundle, wanted=settings.engine, built=settings.tensorrt_folder)
    try:
        # Enough copies that batches are as large as when serving.
        token_ids = TextEncoder(bundle).encode([golden.text for golden in bundle.golden] * 8)
        classify_sorted(engine, token_ids)
        texts, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            classify_sorted(engine, token_ids)
            texts += len(token_ids)
    finally:
        engine.close()
    mean = sum(map(len, token_ids)) / len(token_ids)
    found = f"{texts / elapsed:.0f} texts/s by one thread, with {mean:.0f} tokens a text and no server"
    yield Finding("bench", "ok", found)


def _readable_bundle(settings: Settings) -> Bundle | None:
    """None if it cannot be loaded, which is a finding of `_bundle`."""
    try:
        return load_bundle(settings.bundle)
    except OvertoneError:
        return None


def _source(settings: Settings) -> Iterator[Finding]:
    if settings.twitter_bearer_token is None:
        advice = "Set TWITTER_BEARER_TOKEN to read X."
        yield Finding("posts", "ok", "from the built-in simulator", advice)
    else:
        yield Finding("posts", "ok", f"from {settings.x_api_base_url}, with a bearer token")


def _show(finding: Finding, console: Console) -> None:
    mark = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}[finding.level]
    console.print(f" {mark} {finding.name:<15} {escape(finding.found)}", soft_wrap=True, highlight=False)
    if finding.advice:
        console.print(f"   {'':<15} [dim]{escape(finding.advice)}[/]", soft_wrap=True, highlight=False)
