"""`python -m benchmarks.gpu`: the engines for GPUs beside ONNX Runtime on CUDA as it comes, without a server.

One process and one bundle in fp16 or fp32, best with its torch form (`export.torch: true`). Batches are of like length;
each size of them and each engine is measured in turn, round by round.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bare_engine import Batch, Classify, PlainSession, lone_ms, sorted_batches, texts_per_s
from benchmarks.command import run
from benchmarks.results import RESULTS, Result, middle, ratio, write
from benchmarks.texts import synthetic_texts
from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.engine import check_golden, open_engine
from overtone.errors import ConfigurationError, OvertoneError
from overtone.sessions import CUDA
from overtone.settings import WantedEngine

OUTPUT = RESULTS.with_name("gpu.json")
_TEXTS = 16_384
_LONE_TEXTS = 300
_PLAIN = "plain"
_console = Console(stderr=True)


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle in fp16 or fp32.")],
    engine: Annotated[
        list[str] | None, typer.Option(help="Engines to measure, as ENGINE names them; default: onnx-cuda and torch.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Padded tokens a batch; default: 512 to 131,072.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.05, help="Length of a measurement.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Measurements of each kind.")] = 3,
    provider: Annotated[str, typer.Option(hidden=True, help="Of the session they are compared with.")] = CUDA.provider,
    output: Annotated[Path, typer.Option(help="The file the results are written to.")] = OUTPUT,
) -> None:
    """Measure and write the results."""
    names = _known(engine or ["onnx-cuda", "torch"])
    chosen = load_bundle(bundle)
    token_ids = TextEncoder(chosen).encode(synthetic_texts(_TEXTS))
    budgets = tokens or [512, 2048, 8192, 32_768, 131_072]
    planned = {budget: sorted_batches(token_ids, budget, random.Random(0)) for budget in budgets}
    engines, unavailable = _open(chosen, names)
    classify: dict[str, Classify] = {name: one.classify for name, one in engines.items()}
    classify[_PLAIN] = PlainSession(chosen.model_path, providers=[provider]).classify
    rates: dict[tuple[str, int], list[float]] = {}
    lone: dict[str, list[float]] = {}
    with _console.status("starting") as status:
        for number in range(rounds):
            for budget, batches in planned.items():
                for name, work in classify.items():
                    status.update(f"round {number + 1} of {rounds}: {name}, {budget} tokens a batch")
                    rates.setdefault((name, budget), []).append(_warm_texts_per_s(work, batches, seconds))
            for name, work in classify.items():
                lone.setdefault(name, []).append(middle(lone_ms(work, token_ids[:_LONE_TEXTS])))
    for one in engines.values():
        one.close()
    results: dict[str, Result] = {}
    for name in engines:
        for budget in budgets:
            results[f"gpu.{name}.{budget}.ratio_to_plain"] = ratio(
                rates[name, budget], rates[_PLAIN, budget], texts_per_s=middle(rates[name, budget], 0)
            )
        results[f"gpu.{name}.lone_text"] = Result(middle(lone[name]), "ms", False, {"plain": middle(lone[_PLAIN])})
    write(results, output, model_version=chosen.version, quick=False, unavailable=unavailable)
    _show(rates, lone, budgets)
    for name, reason in unavailable.items():
        _console.print(f"{name} was not measured: {reason}", highlight=False, markup=False)


def _known(names: Sequence[str]) -> list[WantedEngine]:
    known: tuple[WantedEngine, ...] = get_args(WantedEngine)
    if unknown := set(names).difference(known):
        raise ConfigurationError(f"--engine {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    return [one for one in known if one in names]


def _open(bundle: Bundle, names: Sequence[WantedEngine]) -> tuple[dict[str, Any], dict[str, str]]:
    """The engines that run `bundle` here as it was measured, and why others do not."""
    engines: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            engine = open_engine(bundle, wanted=name)
            check_golden(bundle, engine)
            engines[name] = engine
        except OvertoneError as error:
            unavailable[name] = error.message
    return engines, unavailable


def _warm_texts_per_s(classify: Classify, batches: Sequence[Batch], seconds: float) -> float:
    # Whatever a shape costs when it is first seen, on a GPU up to seconds, is no part of the speed.
    deadline = time.perf_counter() + seconds
    for batch in batches:
        classify(batch)
        if time.perf_counter() > deadline:
            break
    return texts_per_s(classify, batches, seconds)


def _show(rates: dict[tuple[str, int], list[float]], lone: dict[str, list[float]], budgets: Sequence[int]) -> None:
    table = Table("texts/s by tokens a batch", *(f"{budget:,}" for budget in budgets), "one text, ms", box=None)
    for name, samples in lone.items():
        speeds = (f"{middle(rates[name, budget]):,.0f}" for budget in budgets)
        table.add_row(name, *speeds, f"{middle(samples):.2f}")
    _console.print(table)


if __name__ == "__main__":
    run(main)
