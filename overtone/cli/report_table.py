"""A report of some days as a table for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from overtone.cli.durations import in_words


def report_table(report: Mapping[str, Any]) -> Table:
    """The figures of `report`, the outcome of a job of that kind: a name and a value a row."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(Text(name), Text(value))
    return table


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    since, until = (str(report[name])[:16].replace("T", " ") for name in ("since", "until"))
    yield "time (UTC)", f"{since} to {until}"
    yield "posts stored", f"{report['posts']['stored']:,}"
    predictions, feedback = report["predictions"], report["feedback"]
    yield "predictions", _said_of_predictions(predictions, predictions["unsure_below"])
    for one in predictions["versions"]:
        yield f"  {one['model_version']}", _said_of_predictions(one, predictions["unsure_below"])
    yield "feedback", _said_of_feedback(feedback)
    for one in feedback["versions"]:
        yield f"  {one['model_version']}", _said_of_feedback(one)
    gaps = report["gaps"]
    length = (
        f", {in_words(gaps['seconds'])} in all, {gaps['repaired_posts']:,} posts repaired" if gaps["states"] else ""
    )
    yield "gaps", _counts(gaps["states"]) + length
    yield "dead letters", f"{report['dead_letters']['new']:,} new, {report['dead_letters']['waiting']:,} waiting"
    yield "jobs", _counts(report["jobs"])
    yield "erasures", f"{report['erasures']['posts']:,} posts, {report['erasures']['authors']:,} authors"


def _said_of_predictions(found: Mapping[str, Any], unsure_below: float) -> str:
    if not found["stored"]:
        return "none"
    sure = f"mean confidence {found['mean_confidence']:.3f}, {found['unsure']:.1%} below {unsure_below:g}"
    return f"{found['stored']:,} ({_counts(found['labels'])}), {sure}"


def _said_of_feedback(found: Mapping[str, Any]) -> str:
    if found["agreement"] is None:
        return f"{found['given']:,} given" if found["given"] else "none"
    return f"{found['given']:,} given, {found['agreement']:.1%} of {found['compared']:,} agree with the prediction"


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(found.items())) or "none"
