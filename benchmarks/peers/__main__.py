"""`python -m benchmarks.peers`: install the peers' environments, and run one peer alone."""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.catalogue import NAMES, PEERS, Peer, peer_named
from benchmarks.peers.environments import environment, install, is_installed
from benchmarks.peers.running import AGREEMENT, agreement, running
from benchmarks.texts import synthetic_texts
from overtone.bundle import load_bundle
from overtone.errors import ConfigurationError, OvertoneError
from overtone.settings import load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Other servers to measure beside.")
_console = Console(stderr=True)

Names = Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}. Default: all.")]


@app.command("list")
def show() -> None:
    """Show the peers, how each is tuned, and whether it is installed."""
    table = Table("peer", "what", "installed", "tuning", box=None)
    for peer in PEERS:
        table.add_row(peer.name, peer.title, "yes" if is_installed(peer) else "no", "\n".join(peer.tuning))
    _console.print(table)


@app.command("install")
def install_peers(names: Names = None) -> None:
    """Make the virtual environment of each peer, one after the other."""
    failed = False
    for peer in _chosen(names):
        if is_installed(peer):
            _console.print(f"{peer.name}: is installed in {environment(peer)}")
            continue
        try:
            with _console.status(f"installing {peer.name}"):
                install(peer)
            _console.print(f"{peer.name}: installed in {environment(peer)}")
        except OvertoneError as error:
            failed = True
            _console.print(f"[red]{peer.name}: {error.message}[/]")
    if failed:
        raise typer.Exit(1)


@app.command()
def check(names: Names = None, texts: Annotated[int, typer.Option(min=32, help="Texts to compare.")] = 512) -> None:
    """Start each peer and compare its labels with the engine's."""
    settings = load_settings()
    bundle = load_bundle(settings.bundle)
    failed = False
    for peer in _chosen(names):
        with tempfile.TemporaryDirectory(prefix="ovp-", ignore_cleanup_errors=True) as folder:
            try:
                with running(peer, settings, Path(folder)) as url:
                    share = agreement(peer, url, bundle, synthetic_texts(texts))
            except OvertoneError as error:
                failed = True
                _console.print(f"[red]{peer.name}: {error.message}[/]", markup=True)
                continue
        failed |= share < AGREEMENT
        _console.print(f"{peer.name}: same label for {share:.1%} of {texts} texts")
    if failed:
        raise typer.Exit(1)


@app.command()
def serve(name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")]) -> None:
    """Run one peer alone until Ctrl-C."""
    peer = _chosen([name])[0]
    with (
        tempfile.TemporaryDirectory(prefix="ovp-", ignore_cleanup_errors=True) as folder,
        running(peer, load_settings(), Path(folder)) as url,
    ):
        _console.print(f"{peer.title} answers at {url}{peer.path}; body: {peer.body(['I love this'])}")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def _chosen(names: list[str] | None) -> list[Peer]:
    unknown = set(names or ()) - set(NAMES)
    if unknown:
        raise ConfigurationError(f"No peer is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return [peer_named(name) for name in names or NAMES]


if __name__ == "__main__":
    try:
        app()
    except OvertoneError as error:
        _console.print(f"[red]{error.message}[/]")
        sys.exit(1)
