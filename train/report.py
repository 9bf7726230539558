"""An evaluation as a page: `index.html` and its plots, which hold figures and no text of a post."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from overtone.errors import EnvironmentProblemError
from train.evaluation import Evaluation
from train.scores import ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"

_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ e.model_version }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right;
border-bottom: 1px solid #dde3ea } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
</style>
<h1>{{ e.model_version }}</h1>
<p>{{ e.scores.rows }} texts, data {{ e.data_sha256[:12] }}.
{{ "%.0f"|format(e.speed.texts_per_s) }} texts/s on {{ e.speed.threads }} threads,
model {{ "%.1f"|format(e.size.model_bytes / 1e6) }} MB.</p>
{% macro table(header, rows) %}<table><tr>{% for one in header %}<th>{{ one }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for one in row %}<td>{{ one }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.rows %}{{ table(section.header, section.rows) }}{% endif %}
{% if section.plot %}<img src="{{ section.plot }}" alt="{{ section.title }}">{% endif %}
{% endfor %}</html>
"""


def write_report(folder: Path, found: Evaluation) -> list[Path]:
    """Write the page of `found` and its plots into `folder` and return their paths, the page first.

    Raises:
        EnvironmentProblemError: matplotlib or Jinja is not installed.
    """
    try:
        import jinja2
        import matplotlib as mpl
    except ImportError as error:
        raise EnvironmentProblemError(f"{error.name} is not installed; pip install 'overtone[train]'") from None
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    sections = _sections(found)
    written = []
    for section in sections:
        plot = section.pop("draw", None)
        if plot is not None:
            section["plot"] = f"{section['name']}.png"
            written.append(folder / section["plot"])
            plot().savefig(written[-1], dpi=110)
    template = jinja2.Environment(autoescape=True).from_string(_TEMPLATE)
    page = folder / PAGE
    page.write_text(template.render(e=found, sections=sections), encoding="utf-8")
    return [page, *written]


def _sections(found: Evaluation) -> list[dict[str, Any]]:
    sections = [
        _section("overall", "Overall", ["figure", "value", "95 %"], _overall_rows(found)),
        _section(
            "labels",
            "Labels",
            ["label", "precision", "recall", "F1", "texts"],
            [
                [name, *_figures(one.precision, one.recall, one.f1), one.support]
                for name, one in found.scores.per_label.items()
            ],
        ),
        _section("confusion", "Confusion", [], [], lambda: _confusion(found)),
        _section("calibration", "Calibration", [], [], lambda: _calibration(found)),
        _section("slices", "Slices", ["slice", "texts", "macro recall", "95 %", "accuracy"], _slice_rows(found)),
    ]
    if found.slices:
        sections[-1]["draw"] = lambda: _slices(found)
    if found.robustness:
        rows = [
            [name, *_figures(one.macro_recall), f"{one.change:+.3f}", f"{one.same_label:.1%}"]
            for name, one in found.robustness.items()
        ]
        header = ["texts changed by", "macro recall", "change", "same label"]
        sections.append(_section("robustness", "Robustness", header, rows, lambda: _robustness(found)))
    if found.baselines:
        rows = [
            [name, *_figures(one.macro_recall, one.macro_f1, one.accuracy)] for name, one in found.baselines.items()
        ]
        sections.append(_section("baselines", "Baselines", ["baseline", "macro recall", "macro F1", "accuracy"], rows))
    return sections


def _section(
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    draw: "Callable[[], Figure] | None" = None,
) -> dict[str, Any]:
    return {"name": name, "title": title, "header": header, "rows": rows, "draw": draw, "plot": None}


def _overall_rows(found: Evaluation) -> list[list[object]]:
    rows: list[list[object]] = [
        [name.replace("_", " "), *_figures(one.value), f"{one.low:.3f} to {one.high:.3f}"]
        for name, one in found.intervals.items()
    ]
    rows.append(["calibration error", *_figures(found.scores.ece), ""])
    rows.append(["calibration error before the temperature", *_figures(found.ece_before_calibration), ""])
    return rows


def _slice_rows(found: Evaluation) -> list[list[object]]:
    return [
        [
            name,
            one.rows,
            *_figures(one.macro_recall.value),
            f"{one.macro_recall.low:.3f} to {one.macro_recall.high:.3f}",
            *_figures(one.accuracy.value),
        ]
        for name, one in found.slices.items()
    ]


def _confusion(found: Evaluation) -> "Figure":
    figure, axes = _figure(5, 4)
    counts = np.array(found.scores.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = list(found.scores.per_label)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour)
    return figure


def _calibration(found: Evaluation) -> "Figure":
    figure, axes = _figure(5, 4)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)

    def draw(bins: Sequence[ReliabilityBin], label: str, marker: str) -> None:
        axes.plot([one.confidence for one in bins], [one.accuracy for one in bins], marker, label=label)

    draw(found.reliability_before, f"before, error {found.ece_before_calibration:.3f}", "x--")
    draw(found.reliability, f"after, error {found.scores.ece:.3f}", "o-")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return figure


def _slices(found: Evaluation) -> "Figure":
    figure, axes = _figure(7, 4)
    names = list(found.slices)
    recalls = [found.slices[name].macro_recall for name in names]
    # Bounds of a slice with few texts may leave the value itself outside by rounding.
    errors = [
        [max(one.value - one.low, 0) for one in recalls],
        [max(one.high - one.value, 0) for one in recalls],
    ]
    axes.barh(names, [one.value for one in recalls], xerr=errors, color="#5b8fd6", ecolor="#1c2330", capsize=2)
    overall = found.intervals["macro_recall"].value
    axes.axvline(overall, color="grey", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel=f"macro-averaged recall, 95 % (line: all texts, {overall:.3f})", xlim=(0, 1))
    return figure


def _robustness(found: Evaluation) -> "Figure":
    figure, axes = _figure(7, 3)
    axes.barh(list(found.robustness), [one.change for one in found.robustness.values()], color="#5b8fd6")
    axes.axvline(0, color="grey", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="change of macro-averaged recall")
    return figure


def _figure(width: float, height: float) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _figures(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]
