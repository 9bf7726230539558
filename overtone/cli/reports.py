"""What `up` says: lines for people, or lines of JSON for programs."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from overtone.cli.durations import in_words
from overtone.cli.rates import Rates
from overtone.cli.state import PartRecord

PAGE = "Page"
"""Title of the address that signs a browser in."""

_PLAIN_EVERY = 15
"""Without a terminal, one line of rates in so many."""


class Report(Protocol):
    """Told by the supervisor what happens."""

    def started(self, part: PartRecord) -> None:
        """`part` is up."""

    def ready(self, addresses: dict[str, str], source: str, seconds: float) -> None:
        """All is up, after `seconds`."""

    def rates(self, rates: Rates) -> None:
        """How fast it goes."""

    def event(self, name: str, message: str) -> None:
        """Something people should know of; `name` is `area.verb_past`."""

    def finished(self, totals: dict[str, Any]) -> None:
        """The run has ended as it should; the last call."""

    def close(self) -> None:
        """Nothing more will be said for now."""


class JsonReport:
    """One JSON object a line on standard output; without the sign-in link where that goes to a log."""

    def __init__(self, stream: TextIO | None = None, *, shows_link: bool = True) -> None:
        self._stream = stream or sys.stdout
        self._shows_link = shows_link

    def started(self, part: PartRecord) -> None:
        self._write("part.started", part=part.name, address=part.address, seconds=round(part.seconds, 2))

    def ready(self, addresses: dict[str, str], source: str, seconds: float) -> None:
        shown = {title: address for title, address in addresses.items() if self._shows_link or title != PAGE}
        self._write("stack.ready", seconds=round(seconds, 2), source=source, addresses=shown)

    def rates(self, rates: Rates) -> None:
        self._write(
            "stack.rates",
            posts_per_s=round(rates.posts_per_s, 1),
            predictions_per_s=round(rates.predictions_per_s, 1),
            requests_per_s=round(rates.requests_per_s, 1),
            p50_ms=None if rates.p50_ms is None else round(rates.p50_ms, 1),
        )

    def event(self, name: str, message: str) -> None:
        self._write(name, message=message)

    def finished(self, totals: dict[str, Any]) -> None:
        self._write("stack.stopped", **totals)

    def close(self) -> None:
        return

    def _write(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()


class TextReport:
    """Lines for people; the rates stay on the last line of a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._looks = 0

    def started(self, part: PartRecord) -> None:
        self._console.print(
            f" [green]✓[/] {part.name:<12} {escape(part.address)} [dim]{part.seconds:.1f} s[/]",
            soft_wrap=True,
            highlight=False,
        )

    def ready(self, addresses: dict[str, str], source: str, seconds: float) -> None:
        self._console.print(f"\n[bold]Overtone is up[/] after {in_words(seconds)}.\n")
        print_addresses(self._console, addresses, source)
        if self._console.is_terminal:
            self._live = Live(Text("  waiting for posts"), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def rates(self, rates: Rates) -> None:
        line = _rates_line(rates)
        if self._live is not None:
            self._live.update(Group(Text(line), Text("  Ctrl-C stops everything.", style="dim")))
            return
        if self._looks % _PLAIN_EVERY == 0:
            self._console.print(line, highlight=False, soft_wrap=True)
        self._looks += 1

    def event(self, name: str, message: str) -> None:
        self._console.print(f" [yellow]•[/] {escape(message)}", soft_wrap=True, highlight=False)

    def finished(self, totals: dict[str, Any]) -> None:
        self.close()
        stored = ""
        if "posts_stored" in totals:  # the database may have been away
            posts, predictions = totals["posts_stored"], totals["predictions_stored"]
            stored = f": {posts:,} posts and {predictions:,} predictions are stored"
        self._console.print(f"Stopped after {in_words(totals['seconds'])}{stored}.", highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def print_addresses(console: Console, addresses: dict[str, str], source: str) -> None:
    """The addresses, one a line, and where posts come from."""
    for title, address in addresses.items():
        # Never folded: these lines are there to be copied.
        console.print(f" [bold]{title:<9}[/] {escape(address)}", soft_wrap=True, highlight=False)
    if source == "simulator":
        console.print(
            "\n [bold yellow]Posts come from the built-in simulator, not from X.[/] "
            "Set TWITTER_BEARER_TOKEN to read X.\n",
            soft_wrap=True,
        )
    else:
        console.print(f"\n Posts come from {escape(source)}.\n", soft_wrap=True)


def curl_line(api_url: str, header: str, key_file: Path) -> str:
    """A command that asks for a prediction and works when it is pasted into a shell."""
    return (
        f'curl -s {api_url}/predict -H "{header}: $(cat {shlex.quote(str(key_file))})"'
        " -H 'Content-Type: application/json' -d '{\"text\": \"I love this\"}'"
    )


def _rates_line(rates: Rates) -> str:
    latency = "no request yet" if rates.p50_ms is None else f"{rates.p50_ms:.0f} ms"
    return (
        f"  {rates.posts_per_s:7.1f} posts/s   {rates.predictions_per_s:7.1f} predictions/s   "
        f"p50 of a prediction request {latency}"
    )
