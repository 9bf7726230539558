"""What a full run publishes: plots in docs/img and the table in README.md, both from the results file alone."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "img"
README = ROOT / "README.md"
START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"

_SHOWN = (
    ("engine.ratio_to_sorted_int8", "Engine alone over plainly quantised ONNX Runtime with texts sorted by length"),
    ("serve.batch256.ratio_to_engine", "`/predict/batch`, 256 texts, over the engine alone"),
    ("serve.single.c64.ratio_to_engine", "`/predict`, 64 connections, over the engine alone"),
    ("serve.single.c1.overhead_ms", "`/predict`, one connection: median above the engine's own time"),
    ("serve.mixed.interactive_p99_batches", "p99 of single texts beside saturating bulk, in engine batches"),
    ("serve.overload.goodput_ratio", "Goodput at three times the capacity, over the capacity"),
    ("serve.overload.recovery_s", "Time from the end of the overload until all is as before"),
)


def publish(results: Path) -> None:
    """Draw the plots and write the table for the results file at `results`."""
    content = json.loads(results.read_text(encoding="utf-8"))
    draw(content, IMAGES)
    README.write_text(with_table(README.read_text(encoding="utf-8"), table(content)), encoding="utf-8")


def table(content: dict[str, Any]) -> str:
    """The Markdown of `content`, a results file: what was measured, and nothing that was not."""
    results = content["results"]
    machine = content["machine"]
    lines = ["| measured | |", "|---|---|"]
    for name, words in _SHOWN:
        if name in results:
            lines.append(f"| {words} | {_number(results[name])} |")
    peers = peers_of(content)
    if peers:
        lines += ["", "| Overtone over | single texts | batches | p99 at equal load |", "|---|---|---|---|"]
    for name, title in peers.items():
        cells = [_times(results.get(f"peers.{name}.{kind}.ratio")) for kind in ("single", "batch", "p99")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for name, why in content.get("unavailable", {}).items():
        lines.append(f"\n{name.removeprefix('peers.')} could not be measured: {why.splitlines()[0][:200]}")
    where = f"{machine['processor']}, {machine['cores']} cores, commit {content['commit']}"
    given = f' ARGS="--rounds {content["rounds"]}"' if content.get("rounds") else ""
    return "\n".join(
        [*lines, "", f"Measured by `make bench-full{given}` on {where}. A p99 below 1 is shorter than the peer's."]
    )


def with_table(text: str, block: str) -> str:
    """`text` with `block` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the text has no lines {START} and {END}")
    return f"{before}{START}\n{block}\n{END}{after}"


def peers_of(content: dict[str, Any]) -> dict[str, str]:
    """Name and title of each peer that was measured, in the order of the file."""
    found = {}
    for name, result in content["results"].items():
        parts = name.split(".")
        if parts[0] == "peers" and parts[2] == "single":
            found[parts[1]] = result["detail"].get("title", parts[1])
    return found


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Plots of `content` in `folder`, as SVG; their paths. Without peers in it there are none."""
    peers = peers_of(content)
    if not peers:
        return []
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "overtone", "svg.fonttype": "none", "font.size": 9}
    folder.mkdir(parents=True, exist_ok=True)
    trials = {name: content["results"][f"peers.{name}.single.ratio"]["detail"]["trials"] for name in peers}
    titles = {"": "Overtone", **peers}
    return [
        _bars(folder / "peers-single.svg", "single texts, 64 connections", titles, _rates(trials, "single", "64")),
        _bars(folder / "peers-batch.svg", "256 texts a request", titles, _rates(trials, "batch", "256")),
    ]


def _rates(trials: dict[str, list[dict[str, Any]]], kind: str, key: str) -> dict[str, float]:
    """Texts a second by peer, the mean of the rounds; ours under the empty name."""
    collected: dict[str, list[float]] = {"": []}
    for name, rounds in trials.items():
        for trial in rounds:
            for side, owner in (("theirs", name), ("before", ""), ("after", "")):
                outcome = trial[side][kind].get(key)
                if outcome:
                    collected.setdefault(owner, []).append(outcome["texts_per_s"])
    return {name: sum(values) / len(values) for name, values in collected.items() if values}


def _bars(path: Path, what: str, titles: dict[str, str], rates: dict[str, float]) -> Path:
    from matplotlib import pyplot

    names = sorted(rates, key=rates.__getitem__)
    figure, axes = pyplot.subplots(figsize=(7, 0.42 * len(names) + 0.9), layout="constrained")
    bars = axes.barh([titles[name] for name in names], [rates[name] for name in names], height=0.62)
    for name, bar in zip(names, bars, strict=True):
        bar.set_color("#9aa5b1" if name else "#2563eb")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel(f"texts a second: {what}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _number(result: dict[str, Any]) -> str:
    unit = {"ratio": "x", "batches": ""}.get(result["unit"], f" {result['unit']}")
    return f"{result['value']:.2f}{unit}"


def _times(result: dict[str, Any] | None) -> str:
    return f"{result['value']:.2f}x" if result else "-"
