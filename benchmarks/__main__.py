"""`python -m benchmarks`: how fast this machine classifies, alone and through the API. Also `make bench`."""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bare_engine import BareEngine, Job
from benchmarks.load import Target
from benchmarks.measure import Effort, measure_engine, measure_server
from benchmarks.results import RESULTS, Result, busy_share, write
from benchmarks.server import own_server
from benchmarks.texts import read_texts, synthetic_texts
from overtone.bundle import load_bundle
from overtone.errors import ConfigurationError, OvertoneError
from overtone.settings import Settings, load_settings

FULL = Effort(rounds=5, seconds=5.0, warm_up_s=3.0)
QUICK = Effort(rounds=2, seconds=2.0, warm_up_s=1.0)
TEXTS = 4096
AIMS = {"serve.single.c64.ratio_to_engine": 0.70, "serve.batch256.ratio_to_engine": 0.90}

_console = Console(stderr=True)


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Short stretches: a check that all works, not a figure.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Write the results to standard output too.")] = False,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = RESULTS,
    texts: Annotated[Path | None, typer.Option(help="TSV with a column `text`. Default: invented posts.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server on this machine. Default: one is started.")] = None,
    engine_only: Annotated[bool, typer.Option("--engine-only", help="Leave the server out.")] = False,
) -> None:
    """Measure the engine alone and the server, in turn, in one run, and write the results.

    With `--url` the key is that of OVERTONE_API_KEY or of the file OVERTONE_HOME/api_key.
    """
    settings = load_settings()
    effort = QUICK if quick else FULL
    chosen = read_texts(texts) if texts else synthetic_texts(TEXTS)
    _warn_of_neighbours()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ovb-")))
        say = stack.enter_context(_console.status("starting")).update
        bundle = load_bundle(settings.bundle)
        engine = stack.enter_context(BareEngine(Job(settings.bundle, chosen)))
        results = measure_engine(engine, effort, say)
        if not engine_only:
            say("starting a server")
            target = _running(settings, url) if url else stack.enter_context(own_server(settings, _home(folder)))
            results |= measure_server(target, engine, chosen, effort, folder, say)
    write(results, output, model_version=bundle.version, quick=quick)
    _show(results, output)
    if json_output:
        sys.stdout.write(output.read_text(encoding="utf-8"))


def _warn_of_neighbours() -> None:
    share = busy_share(1.0)
    if share > 0.1:
        _console.print(f"[yellow]Other programs use {share:.0%} of the processor: ratios are rough, rates are low.[/]")


def _running(settings: Settings, url: str) -> Target:
    if settings.overtone_api_key is not None:
        key = settings.overtone_api_key.get_secret_value()
    else:
        try:
            key = (settings.home / "api_key").read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigurationError(
                "--url needs a key: set OVERTONE_API_KEY, or OVERTONE_HOME to the server's"
            ) from error
    return Target(url.rstrip("/"), settings.api_key_header, key)


def _home(folder: Path) -> Path:
    home = folder / "home"
    home.mkdir(mode=0o700)
    return home


def _show(results: dict[str, Result], output: Path) -> None:
    table = Table("measured", "value", "", "texts/s", "p50 ms", "p99 ms", box=None)
    for name, result in results.items():
        aim = f"aim {AIMS[name]:.2f}" if name in AIMS else ""
        figures = [str(result.detail.get(key, "")) for key in ("texts_per_s", "p50_ms", "p99_ms")]
        table.add_row(name, f"{result.value:g} {result.unit}", aim, *figures)
    _console.print(table)
    generators = {result.detail["generator"] for result in results.values() if "generator" in result.detail}
    _console.print(f"Load generator: {' and '.join(sorted(generators)) or 'none'}. Every sample is in {output}.")


def main() -> None:
    """Run; a failure that has a reason ends with the reason alone."""
    try:
        typer.run(bench)
    except OvertoneError as error:
        _console.print(f"[red]{error.message}[/]")
        sys.exit(1)


if __name__ == "__main__":
    main()
