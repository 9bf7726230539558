"""`python -m train.gate`: does the challenger replace the champion?

It does when it is better on the same texts by more than chance explains, and worse on no kind of text that is guarded.
The decision and its reasons are kept with the challenger in the registry; a promotion is carried out by
`overtone models promote`, which has every replica swap bundles and moves the aliases.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console
from rich.table import Table

from overtone.bundle import Bundle, load_bundle
from overtone.errors import BundleError, ConfigurationError, DataError, NotFoundError, OvertoneError
from overtone.logging import configure
from overtone.registry import Registered, Registry, is_in_use
from overtone.settings import Settings, environment_for, load_settings
from train.bootstrap import Interval, intervals, paired_difference
from train.config import read_values
from train.data import LabelledTexts, read_labelled
from train.evaluation import Reader
from train.exits import as_exit_code
from train.scores import calibration_error
from train.slices import SLICES, slices_of

CHALLENGER, CHAMPION = "challenger", "champion"
KEPT = 3
"""Exit code when the champion stays."""

_PROMOTE_TIMEOUT_S = 600.0
_BUNDLE_EXIT = 8

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Rules(BaseModel):
    """What a challenger must show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_gain: float = Field(0.0, ge=-1, le=1)
    """Of macro-averaged recall; the confidence interval of the difference must lie above it."""
    guarded: tuple[str, ...] = (
        "short",
        "medium",
        "long",
        "emoji",
        "negation",
        "hashtag",
        "mention",
        "all_caps",
        "question",
    )
    """Slices on which the challenger may lose no more than `slice_tolerance`."""
    slice_tolerance: float = Field(0.02, ge=0, le=1)
    """Of macro-averaged recall."""
    min_slice_rows: int = Field(100, ge=1)
    """Slices with fewer texts are not judged."""
    max_ece: float = Field(0.08, ge=0, le=1)
    """Expected calibration error of the challenger."""

    @field_validator("guarded")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(names) - set(SLICES)
        if unknown:
            raise ValueError(f"no slice {', '.join(sorted(unknown))}; known: {', '.join(SLICES)}")
        return names


@dataclass(frozen=True)
class Comparison:
    """Macro-averaged recall of both on the same texts."""

    rows: int
    champion: float
    challenger: float
    difference: Interval
    """The challenger's less the champion's."""


@dataclass(frozen=True)
class Decision:
    """Whether the challenger wins, and why."""

    challenger: str
    champion: str
    promotes: bool
    reasons: tuple[str, ...]
    overall: Comparison
    slices: dict[str, Comparison]
    """The guarded ones that were judged."""
    ece: float
    """Expected calibration error of the challenger."""
    data_sha256: str = ""
    carried_out: bool = False
    """Whether the challenger was promoted: it won, this was no dry run, and it was not refused."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def load_rules(path: Path | None) -> Rules:
    """The rules in the YAML file `path`; without one the defaults, which `configs/train/gate.yaml` spells out.

    Raises:
        ConfigurationError: naming the file and each value that is wrong.
    """
    return read_values(path, Rules, "the rules are")


def decide(
    rules: Rules,
    data: LabelledTexts,
    challenger: tuple[Bundle, NDArray[np.float32]],
    champion: tuple[Bundle, NDArray[np.float32]],
) -> Decision:
    """Judge by the probabilities [texts, labels] that both bundles give `data`. Pure."""
    labels = len(champion[0].labels)
    ours, theirs = (side[1].argmax(axis=1) for side in (challenger, champion))

    def compare(rows: NDArray[np.bool_]) -> Comparison:
        truth, mine, other = data.labels[rows], ours[rows], theirs[rows]
        before, after = (intervals(truth, one, labels)["macro_recall"].value for one in (other, mine))
        return Comparison(int(rows.sum()), before, after, paired_difference(truth, mine, other, labels))

    overall = compare(np.ones(len(data), dtype=bool))
    kinds = slices_of(data.raw or data.texts)
    judged = {name: compare(kinds[name]) for name in rules.guarded if kinds[name].sum() >= rules.min_slice_rows}
    ece = calibration_error(challenger[1], data.labels)
    against = _reasons_against(rules, overall, judged, ece)
    found = overall.difference
    gain = f"macro-averaged recall {found.value:+.4f} (95 %: {found.low:+.4f} to {found.high:+.4f})"
    return Decision(
        challenger=challenger[0].version,
        champion=champion[0].version,
        promotes=not against,
        reasons=tuple(against) or (f"{gain}; no loss on {len(judged)} guarded slices",),
        overall=overall,
        slices=judged,
        ece=ece,
        data_sha256=data.sha256,
    )


def _reasons_against(rules: Rules, overall: Comparison, judged: dict[str, Comparison], ece: float) -> list[str]:
    found = overall.difference
    reasons = []
    if not found.low > rules.min_gain:
        reasons.append(
            f"macro-averaged recall {found.value:+.4f}: the 95 % confidence interval of {found.low:+.4f} to "
            f"{found.high:+.4f} does not lie above {rules.min_gain:+.4f}"
        )
    reasons += [
        f"slice {name}: {one.difference.value:+.4f} on {one.rows} texts; {-rules.slice_tolerance:+.4f} is allowed"
        for name, one in judged.items()
        if one.difference.value < -rules.slice_tolerance
    ]
    if ece > rules.max_ece:
        reasons.append(f"calibration error {ece:.4f}; at most {rules.max_ece} is allowed")
    return reasons


def decide_and_promote(
    settings: Settings, challenger: str, champion: str, data: Path, rules: Rules, *, is_dry_run: bool = False
) -> Decision:
    """Judge two bundles, each a folder or a name in the registry, on the texts in `data`; promote the challenger if it
    wins; keep the decision in the registry, if the challenger is from there.

    Raises:
        BundleError: the replicas refused the challenger; the champion is served as before.
        DataError: the texts cannot be used.
        NotFoundError: the registry has no such version.
        ConfigurationError: the two have different labels.
    """
    registry = Registry(settings) if is_in_use(settings) else None
    registered, ours = _find(settings, registry, challenger)
    _, theirs = _find(settings, registry, champion)
    if ours.labels != theirs.labels:
        raise ConfigurationError(
            f"the challenger's labels are {', '.join(ours.labels)} and the champion's {', '.join(theirs.labels)}"
        )
    texts = read_labelled(data, theirs.labels)
    decision = decide(rules, texts, (ours, _read(ours, texts)), (theirs, _read(theirs, texts)))
    if is_dry_run:
        return decision
    try:
        if decision.promotes:
            is_served = _promote(settings, ours.path)
            later = (
                ()
                if is_served
                else (f"nothing is served in {settings.home}: the next start serves it, or `overtone k8s follow`",)
            )
            decision = replace(decision, carried_out=True, reasons=(*decision.reasons, *later))
    except OvertoneError as error:
        decision = replace(decision, reasons=(*decision.reasons, f"not carried out: {error.message}"))
        raise
    finally:
        if registry and registered:
            _keep(registry, registered, decision, rules)
    return decision


def _find(settings: Settings, registry: Registry | None, name: str) -> tuple[Registered | None, Bundle]:
    if Path(name).is_dir():
        return None, load_bundle(Path(name))
    found = registry.find(name) if registry else None
    if found is not None and registry is not None:
        return found, registry.fetch(found)
    if name == CHAMPION:
        # Nothing was promoted yet: what is served is what a fresh start serves.
        return None, load_bundle(settings.bundle)
    raise NotFoundError(f"{name}: is neither a folder nor in the registry, which `python -m train --register` fills")


def _read(bundle: Bundle, data: LabelledTexts) -> NDArray[np.float32]:
    with Reader(bundle) as reader:
        return reader.read(data.raw or data.texts)


def _promote(settings: Settings, folder: Path) -> bool:
    """Through the command, because whoever serves owns how bundles are swapped; whether replicas serve it now."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "overtone.cli", "models", "promote", str(folder), "--json"],
            env=environment_for(settings),
            capture_output=True,
            text=True,
            timeout=_PROMOTE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OvertoneError(f"overtone models promote did not end within {_PROMOTE_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        told = done.stderr.strip().removeprefix("Error:").strip() or f"exit code {done.returncode}"
        raise (BundleError if done.returncode == _BUNDLE_EXIT else OvertoneError)(told)
    return bool(orjson.loads(done.stdout)["state"] == "done")


def _keep(registry: Registry, registered: Registered, decision: Decision, rules: Rules) -> None:
    now = datetime.now(UTC)
    outcome = "promoted" if decision.carried_out else "refused" if decision.promotes else "kept the champion"
    tags = {
        "gate": outcome,
        "gate_champion": decision.champion,
        "gate_difference": f"{decision.overall.difference.value:+.4f}",
        "gate_reasons": "; ".join(decision.reasons)[:1000],
        "gate_at": now.isoformat(timespec="seconds"),
    }
    document = {"decided_at": tags["gate_at"], "outcome": outcome, **decision.as_dict(), "rules": rules.model_dump()}
    registry.note(registered, tags, document, f"gate/{now:%Y%m%dT%H%M%S}.json")


def show_decision(console: Console, decision: Decision) -> None:
    """Print `decision` as a table and a verdict."""
    table = Table("texts", "number", "champion", "challenger", "difference", "95 %")
    for name, one in {"all": decision.overall, **decision.slices}.items():
        found = one.difference
        bounds = f"{found.low:+.3f} to {found.high:+.3f}"
        table.add_row(
            name, str(one.rows), f"{one.champion:.3f}", f"{one.challenger:.3f}", f"{found.value:+.3f}", bounds
        )
    console.print(table)
    verdict = "beats" if decision.promotes else "does not replace"
    console.print(f"{decision.challenger} {verdict} {decision.champion}:", highlight=False)
    for reason in decision.reasons:
        console.print(f"- {reason}", highlight=False)
    if decision.carried_out:
        console.print(f"[green]promoted[/]: {decision.challenger} is the champion", highlight=False)


def exit_code(decision: Decision) -> int:
    """0 when the challenger wins, `KEPT` when the champion stays."""
    return 0 if decision.promotes else KEPT


@app.command()
def command(
    data: Annotated[Path, typer.Option(help="Labelled texts kept apart from training and validation.")],
    challenger: Annotated[str, typer.Option(help="Folder of a bundle, or its name in the registry.")] = CHALLENGER,
    champion: Annotated[str, typer.Option(help="The same for the bundle to beat.")] = CHAMPION,
    rules: Annotated[
        Path | None, typer.Option(help="Rules in YAML. Default: those of configs/train/gate.yaml.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge, and change and keep nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Compare two bundles on the same texts; promote the challenger if it wins.

    Exit code 0: it wins; 3: the champion stays; 2: texts, rules or names are wrong; 1: anything else.
    """
    with as_exit_code(ConfigurationError, DataError, NotFoundError):
        settings = load_settings()
        configure("train", settings.log_level, settings.log_format)
        decision = decide_and_promote(settings, challenger, champion, data, load_rules(rules), is_dry_run=dry_run)
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(decision.as_dict()) + b"\n")
    else:
        show_decision(Console(), decision)
    raise typer.Exit(exit_code(decision))


if __name__ == "__main__":
    app()
