"""`python -m benchmarks.gpu`: the engines for GPUs beside ONNX Runtime on CUDA as it comes, without a server.

One process and one bundle in fp16 or fp32, best with its torch form (`export.torch: true`). Batches are of like length;
each size of them and each engine is measured in turn, round by round.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bare_engine import PlainSession
from benchmarks.results import RESULTS, Result, middle, ratio, write
from benchmarks.texts import synthetic_texts
from overtone.bundle import Bundle, TextEncoder, load_bundle
from overtone.engine import check_golden, open_engine, plan_batches
from overtone.errors import OvertoneError
from overtone.sessions import CUDA
from overtone.settings import WantedEngine

OUTPUT = RESULTS.with_name("gpu.json")
_TEXTS = 16_384
_LONE_TEXTS = 300
_PLAIN = "plain"
_console = Console(stderr=True)

Classify = Callable[[list[list[int]]], Any]


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle in fp16 or fp32.")],
    engine: Annotated[
        list[WantedEngine] | None, typer.Option(help="Engines to measure; default: onnx-cuda and torch.")
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
    chosen = load_bundle(bundle)
    token_ids = TextEncoder(chosen).encode(synthetic_texts(_TEXTS))
    budgets = tokens or [512, 2048, 8192, 32_768, 131_072]
    engines, unavailable = _open(chosen, engine or ["onnx-cuda", "torch"])
    classify: dict[str, Classify] = {name: one.classify for name, one in engines.items()}
    classify[_PLAIN] = PlainSession(chosen.model_path, providers=[provider]).classify
    rates: dict[tuple[str, int], list[float]] = {}
    lone: dict[str, list[float]] = {}
    with _console.status("starting") as status:
        for number in range(rounds):
            for budget in budgets:
                batches = _batches(token_ids, budget)
                for name, work in classify.items():
                    status.update(f"round {number + 1} of {rounds}: {name}, {budget} tokens a batch")
                    rates.setdefault((name, budget), []).append(_texts_per_s(work, batches, seconds))
            for name, work in classify.items():
                lone.setdefault(name, []).append(_lone_ms(work, token_ids))
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


def _batches(token_ids: Sequence[list[int]], budget: int) -> list[list[list[int]]]:
    plan = plan_batches([len(ids) for ids in token_ids], budget)
    random.Random(0).shuffle(plan)
    return [[token_ids[row] for row in rows] for rows in plan]


def _texts_per_s(classify: Classify, batches: Sequence[list[list[int]]], seconds: float) -> float:
    # Whatever a shape costs when it is first seen, on a GPU up to seconds, is no part of the speed.
    deadline = time.perf_counter() + seconds
    for batch in batches:
        classify(batch)
        if time.perf_counter() > deadline:
            break
    done = number = 0
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        batch = batches[number % len(batches)]
        classify(batch)
        done += len(batch)
        number += 1
    return done / (now - started)


def _lone_ms(classify: Classify, token_ids: Sequence[list[int]]) -> float:
    samples = []
    for ids in token_ids[:_LONE_TEXTS]:
        started = time.perf_counter()
        classify([ids])
        samples.append((time.perf_counter() - started) * 1000)
    return middle(samples)


def _show(rates: dict[tuple[str, int], list[float]], lone: dict[str, list[float]], budgets: Sequence[int]) -> None:
    table = Table("texts/s by tokens a batch", *(f"{budget:,}" for budget in budgets), "one text, ms", box=None)
    for name, samples in lone.items():
        speeds = (f"{middle(rates[name, budget]):,.0f}" for budget in budgets)
        table.add_row(name, *speeds, f"{middle(samples):.2f}")
    _console.print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except OvertoneError as error:
        _console.print(f"[red]{error.message}[/]")
        sys.exit(1)
