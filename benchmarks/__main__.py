"""`python -m benchmarks`: how fast this machine classifies, alone, through the API, and beside other servers.

Also `make bench` and `make bench-full`. What each figure means is in docs/benchmarks.md.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bare_engine import BareEngine, Job
from benchmarks.command import require_parts, run
from benchmarks.compare import Comparison
from benchmarks.load import Target
from benchmarks.measure import Effort, Say, measure_baseline, measure_engine, measure_server, measure_torch
from benchmarks.peers.catalogue import NAMES, PEERS
from benchmarks.report import publish
from benchmarks.results import RESULTS, Result, busy_share, write
from benchmarks.server import own_server
from benchmarks.stress import measure_mixed, measure_open, measure_overload
from benchmarks.texts import read_texts, synthetic_texts
from overtone.bundle import Bundle, load_bundle
from overtone.errors import BundleError, ConfigurationError, UnauthorizedError
from overtone.logging import configure
from overtone.settings import Settings, load_settings

USUAL = Effort(rounds=5, seconds=5.0, warm_up_s=3.0)
QUICK = Effort(rounds=2, seconds=2.0, warm_up_s=1.0)
FULL = Effort(rounds=5, seconds=5.0, warm_up_s=3.0, overload_s=60.0)
PEER_EFFORT = Effort(rounds=3, seconds=5.0, warm_up_s=3.0)

TEXTS = 4096
SERVER_PARTS = ("server", "open", "mixed", "overload")
USUAL_PARTS = ("engine", "server", "mixed", "overload")
FULL_PARTS = ("engine", *SERVER_PARTS, "peers")
PARTS = (*FULL_PARTS, "torch", *(f"peers.{name}" for name in NAMES))

AIMS = {
    "engine.ratio_to_sorted_int8": "at least 1.15",
    "serve.single.c64.ratio_to_engine": "at least 0.75",
    "serve.batch256.ratio_to_engine": "at least 0.92",
    "serve.single.c1.overhead_ms": "at most 1.5",
    "serve.mixed.interactive_p99_batches": "at most 3",
    "serve.overload.goodput_ratio": "at least 0.90",
    "serve.overload.recovery_s": "at most 2",
    "serve.overload.refusal_p99_ms": "at most 50",
    "peers.rayserve.single.ratio": "at least 2.3",
    **{f"peers.{name}.single.ratio": "at least 1.5" for name in NAMES if name != "rayserve"},
    **{f"peers.{name}.batch.ratio": "at least 1.25" for name in NAMES},
    **{f"peers.{name}.p99.ratio": "below 1" for name in NAMES},
}

_console = Console(stderr=True)


@dataclass(slots=True)
class _Run:
    """One run of the command."""

    settings: Settings
    bundle: Bundle
    texts: list[str]
    effort: Effort
    folder: Path
    say: Say
    url: str | None
    results: dict[str, Result] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def measure(self, parts: set[str]) -> None:
        """Measure `parts`: the engine, one server for all that is asked of it, then the peers."""
        if "engine" in parts:
            with BareEngine(Job(self.settings.bundle, self.texts)) as engine:
                self._engine(engine)
        if "torch" in parts:
            self.results |= measure_torch(self.bundle, self.texts, self.effort, self.say)
        if parts & set(SERVER_PARTS):
            with self.server() as target:
                self._server(target, parts)
        peers = [peer for peer in PEERS if parts & {"peers", f"peers.{peer.name}"}]
        if peers:
            effort = replace(PEER_EFFORT, rounds=min(PEER_EFFORT.rounds, self.effort.rounds))
            effort = effort if self.effort.seconds >= effort.seconds else self.effort
            comparison = Comparison(self.settings, self.bundle, self.texts, effort, self.server)
            results, unavailable = comparison.run(peers, self.say)
            self.results |= results
            self.unavailable |= unavailable

    def _engine(self, engine: BareEngine) -> None:
        self.results |= measure_engine(engine, self.effort, self.say)
        try:
            self.results |= measure_baseline(engine, self.bundle, self.effort, self.say)
        except BundleError as error:
            self.unavailable["engine.ratio_to_sorted_int8"] = error.message

    def _server(self, target: Target, parts: set[str]) -> None:
        if "server" in parts:
            with BareEngine(Job(self.settings.bundle, self.texts)) as engine:
                self.results |= measure_server(target, engine, self.texts, self.effort, self.folder, self.say)
        for name, measure in (("open", measure_open), ("mixed", measure_mixed), ("overload", measure_overload)):
            if name in parts:
                self.results |= measure(target, self.texts, self.effort, self.folder, self.say)

    @contextlib.contextmanager
    def server(self) -> Iterator[Target]:
        """The server that is measured."""
        if self.url:
            yield _running(self.settings, self.url)
            return
        self.say("starting a server")
        # Short: sockets are made below it, and their paths may have 107 characters.
        with tempfile.TemporaryDirectory(prefix="ovb-") as home, own_server(self.settings, Path(home)) as target:
            yield target


def bench(  # noqa: PLR0913, PLR0917  # each is an option of the command
    quick: Annotated[
        bool, typer.Option("--quick", help="Short stretches: a check that all works, not a figure.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Everything, peers too; plots and the table in README.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure only this, may be repeated: {', '.join(PARTS)}.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=100, help="Rounds of everything.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Write the results to standard output too.")] = False,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = RESULTS,
    texts: Annotated[Path | None, typer.Option(help="TSV with a column `text`. Default: invented posts.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server on this machine. Default: one is started.")] = None,
) -> None:
    """Measure the engine alone, the server and, with --full, the peers, in turn, and write the results.

    With `--url` the key is that of OVERTONE_API_KEY or of the file OVERTONE_HOME/api_key.
    """
    settings = load_settings()
    configure("benchmark", "WARNING", "console")
    parts = _parts(full, only, url)
    effort = QUICK if quick else FULL if full else USUAL
    effort = replace(effort, rounds=rounds or effort.rounds)
    chosen = read_texts(texts) if texts else synthetic_texts(TEXTS)
    bundle = load_bundle(settings.bundle)
    _warn_of_neighbours()
    with tempfile.TemporaryDirectory(prefix="ovl-") as folder, _console.status("starting") as status:
        run = _Run(settings, bundle, chosen, effort, Path(folder), status.update, url)
        try:
            run.measure(parts)
        finally:
            # What took an hour is not lost by what fails in the next minute; what fails at once replaces no results.
            if run.results or run.unavailable:
                write(
                    run.results,
                    output,
                    model_version=bundle.version,
                    quick=quick,
                    rounds=effort.rounds,
                    unavailable=run.unavailable,
                )
    _show(run, output)
    if full and not quick and not only:
        publish(output)
    if json_output:
        sys.stdout.write(output.read_text(encoding="utf-8"))


def _parts(full: bool, only: list[str] | None, url: str | None) -> set[str]:
    require_parts(only, PARTS)
    parts = set(only or (FULL_PARTS if full else USUAL_PARTS))
    if url and any(part.startswith("peers") for part in parts):
        raise ConfigurationError("Peers are measured in turn with servers of our own, so --url cannot go with them")
    return parts


def _warn_of_neighbours() -> None:
    share = busy_share(1.0)
    if share > 0.1:
        _console.print(f"[yellow]Other programs use {share:.0%} of the processor: ratios are rough, rates are low.[/]")


def _running(settings: Settings, url: str) -> Target:
    try:
        key = settings.read_api_key()
    except UnauthorizedError as error:
        raise ConfigurationError("--url needs a key: set OVERTONE_API_KEY, or OVERTONE_HOME to the server's") from error
    return Target(url.rstrip("/"), settings.api_key_header, key)


def _show(run: _Run, output: Path) -> None:
    table = Table("measured", "value", "aim", "texts/s", "p50 ms", "p99 ms", box=None)
    for name, result in run.results.items():
        figures = [str(result.detail.get(key, "")) for key in ("texts_per_s", "p50_ms", "p99_ms")]
        table.add_row(name, f"{result.value:g} {result.unit}", AIMS.get(name, ""), *figures)
    _console.print(table)
    for name, why in run.unavailable.items():
        _console.print(f"[yellow]{name} was not measured:[/]", why, markup=True)
    generators = {result.detail["generator"] for result in run.results.values() if "generator" in result.detail}
    _console.print(f"Load generator: {' and '.join(sorted(generators)) or 'none'}. Every sample is in {output}.")


def main() -> None:
    """Run; a failure that has a reason ends with the reason alone."""
    run(bench)


if __name__ == "__main__":
    main()
