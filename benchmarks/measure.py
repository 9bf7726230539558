"""What is measured, round by round: the engine alone, then the server, then the engine alone again."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bare_engine import PLAIN_BATCH, BareEngine, Job
from benchmarks.load import Load, Outcome, Target, batch_bodies, single_bodies
from benchmarks.plain_model import plain_model
from benchmarks.results import Result, middle, ratio
from benchmarks.torch_bundle import torch_bundle
from overtone.bundle import Bundle
from overtone.engine import BUDGET_TOKENS
from overtone.torch_engine import usable_target

BUDGETS = (128, 256, 384, 512, 1024)
BATCH_TEXTS = 256
SINGLE_CONNECTIONS = 64

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    """Of one stretch; a round has one stretch of each side."""
    warm_up_s: float
    overload_s: float = 10.0


def measure_engine(engine: BareEngine, effort: Effort, say: Say) -> dict[str, Result]:
    """The engine against plain use of ONNX Runtime, and texts a second around the default budget."""
    ours: list[float] = []
    plain: list[float] = []
    wide: list[float] = []
    budgets: dict[int, list[float]] = defaultdict(list)
    engine.texts_per_s(effort.warm_up_s)
    for number in range(effort.rounds):
        say(f"engine, round {number + 1} of {effort.rounds}")
        ours.append(engine.texts_per_s(effort.seconds))
        plain.append(engine.plain_texts_per_s(effort.seconds))
        wide.append(engine.wide_texts_per_s(effort.seconds / 2))
        for budget in BUDGETS:
            budgets[budget].append(engine.texts_per_s(effort.seconds / 2, budget))
    detail = {"ours_texts_per_s": ours, "plain_texts_per_s": plain}
    plain_means = f"the same model file, default session options, batches of {PLAIN_BATCH} in order of arrival"
    layouts = {
        "processes": engine.workers,
        "threads_each": 1,
        "budget_tokens": BUDGET_TOKENS,
        "by_budget_tokens": {str(budget): middle(samples, 1) for budget, samples in budgets.items()},
        "one_session_of_all_threads": middle(wide, 1),
    }
    return {
        "engine.texts_per_s": Result(middle(ours, 1), "texts/s", True, {"samples": ours, **layouts}),
        "engine.ratio_to_plain_ort": ratio(ours, plain, plain=plain_means, **detail),
    }


def measure_baseline(engine: BareEngine, bundle: Bundle, effort: Effort, say: Say) -> dict[str, Result]:
    """The engine against the same weights plainly quantised, in a default session, with texts sorted by length.

    Raises:
        BundleError: the model of `bundle` is not one of which such a file can be made.
    """
    say("making the plainly quantised model")
    model = plain_model(bundle)
    ours: list[float] = []
    theirs: list[float] = []
    engine.baseline_texts_per_s(effort.warm_up_s, model)
    for number in range(effort.rounds):
        say(f"engine and its baseline, round {number + 1} of {effort.rounds}")
        ours.append(engine.texts_per_s(effort.seconds))
        theirs.append(engine.baseline_texts_per_s(effort.seconds, model))
    means = f"default session options, {engine.workers} threads, batches of {PLAIN_BATCH} sorted by length"
    detail = {"ours_texts_per_s": ours, "baseline_texts_per_s": theirs}
    return {"engine.ratio_to_sorted_int8": ratio(ours, theirs, baseline=means, **detail)}


def measure_torch(bundle: Bundle, texts: list[str], effort: Effort, say: Say) -> dict[str, Result]:
    """The engine on torch against the usual one with the same texts: with the bundle as it is, and in fp32.

    Raises:
        BundleError: the bundle has no torch form, and none can be made of its model.
        ConfigurationError: torch is not installed.
    """
    say("making the bundle for torch")
    on_torch = torch_bundle(bundle)
    results = {}
    for precision, path in {bundle.precision: bundle.path, on_torch.precision: on_torch.path}.items():
        ours: list[float] = []
        theirs: list[float] = []
        with BareEngine(Job(path, texts)) as engine:
            engine.texts_per_s(effort.warm_up_s)
            engine.torch_texts_per_s(effort.warm_up_s, on_torch.path)
            for number in range(effort.rounds):
                say(f"torch and {precision} ONNX, round {number + 1} of {effort.rounds}")
                ours.append(engine.torch_texts_per_s(effort.seconds, on_torch.path))
                theirs.append(engine.texts_per_s(effort.seconds))
            detail = {"processes": engine.workers, "threads_each": 1, "budget_tokens": BUDGET_TOKENS}
        detail |= {"torch_texts_per_s": ours, "onnx_texts_per_s": theirs, "torch": asdict(usable_target())}
        results[f"engine.torch.ratio_to_{precision}"] = ratio(ours, theirs, **detail)
    return results


@dataclass(frozen=True, slots=True)
class _Case:
    """One kind of load, repeated in every round."""

    name: str
    load: Load
    connections: int


def measure_server(
    target: Target, engine: BareEngine, texts: list[str], effort: Effort, folder: Path, say: Say
) -> dict[str, Result]:
    """The server under load, each stretch between two stretches of the engine alone on the idle server's machine."""
    single = Load(target, "/predict", single_bodies(texts), 1, folder)
    batch = Load(target, "/predict/batch", batch_bodies(texts, BATCH_TEXTS), BATCH_TEXTS, folder)
    # Two requests a replica: one in the engine, one that waits for it.
    cases = [
        _Case(f"serve.single.c{SINGLE_CONNECTIONS}", single, SINGLE_CONNECTIONS),
        _Case(f"serve.batch{BATCH_TEXTS}", batch, 2 * engine.workers),
    ]
    for case in cases:
        case.load.run(case.connections, effort.warm_up_s)
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    bare: dict[str, list[float]] = defaultdict(list)
    lone_ms: list[float] = []
    lone: list[Outcome] = []
    before = engine.texts_per_s(effort.seconds)
    for number in range(effort.rounds):
        for case in cases:
            say(f"{case.name}, round {number + 1} of {effort.rounds}")
            outcomes[case.name].append(case.load.run(case.connections, effort.seconds))
            after = engine.texts_per_s(effort.seconds)
            bare[case.name].append((before + after) / 2)
            before = after
        lone_ms.append(middle(engine.single_ms(200)))
        lone.append(single.run(1, min(effort.seconds, 3.0)))
    results = {
        f"{case.name}.ratio_to_engine": _against_engine(case, outcomes[case.name], bare[case.name]) for case in cases
    }
    overheads = [round(outcome.p50_ms - alone, 4) for outcome, alone in zip(lone, lone_ms, strict=True)]
    detail: dict[str, Any] = {"samples": overheads, "engine_p50_ms": lone_ms, "server": [asdict(each) for each in lone]}
    return {**results, "serve.single.c1.overhead_ms": Result(middle(overheads), "ms", False, detail)}


def _against_engine(case: _Case, outcomes: list[Outcome], bare: list[float]) -> Result:
    return ratio(
        [outcome.texts_per_s for outcome in outcomes],
        bare,
        connections=case.connections,
        generator=case.load.generator,
        texts_per_s=middle([outcome.texts_per_s for outcome in outcomes], 1),
        p50_ms=middle([outcome.p50_ms for outcome in outcomes], 2),
        p99_ms=middle([outcome.p99_ms for outcome in outcomes], 2),
        engine_texts_per_s=bare,
        server=[asdict(outcome) for outcome in outcomes],
    )
