"""Texts a second of the engine alone: one process and one thread a core, texts tokenised before, sorted by length.

This is the most that a server on the same machine can reach, so every figure of the server is divided by it.
"""

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from overtone.bundle import TextEncoder, load_bundle
from overtone.engine import BUDGET_TOKENS, Engine, open_engine, pad, plan_batches
from overtone.hardware import usable_cores
from overtone.torch_engine import TorchEngine

PLAIN_BATCH = 32

Batch = list[list[int]]
"""The token ids of its texts."""
Classify = Callable[[Batch], Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What the processes load once, before anything is measured."""

    bundle: Path | None
    texts: list[str]


class BareEngine:
    """Engine processes that wait, without using a core, until they are told to measure."""

    def __init__(self, job: Job, workers: int | None = None) -> None:
        """Start `workers` processes (default: one a core this process may use) and wait until each has loaded."""
        self.workers = workers or usable_cores()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job, number), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)

    def texts_per_s(self, seconds: float, budget_tokens: int = BUDGET_TOKENS) -> float:
        """Of all processes together, in batches of like length of at most `budget_tokens` padded tokens."""
        for pipe in self._pipes:
            pipe.send(("sorted", (seconds, budget_tokens)))
        return float(sum(pipe.recv() for pipe in self._pipes))

    def torch_texts_per_s(self, seconds: float, bundle: Path, budget_tokens: int = BUDGET_TOKENS) -> float:
        """As `texts_per_s`, by the engine on torch with the torch form of the bundle at `bundle`."""
        for pipe in self._pipes:
            pipe.send(("torch", (seconds, bundle, budget_tokens)))
        return float(sum(pipe.recv() for pipe in self._pipes))

    def wide_texts_per_s(self, seconds: float, budget_tokens: int = BUDGET_TOKENS) -> float:
        """Of one session with a thread a core, instead of one session a core."""
        return float(self._ask_first("wide", (seconds, budget_tokens, self.workers)))

    def plain_texts_per_s(self, seconds: float) -> float:
        """Of the same file in an ONNX Runtime session with default options, batches in order of arrival."""
        return float(self._ask_first("plain", (seconds,)))

    def baseline_texts_per_s(self, seconds: float, model: Path) -> float:
        """Of the file `model` in a session with default options and a thread a core, batches sorted by length."""
        return float(self._ask_first("baseline", (seconds, model, self.workers)))

    def single_ms(self, texts: int) -> list[float]:
        """Milliseconds of each of `texts` texts, one at a time."""
        result: list[float] = self._ask_first("single", (texts,))
        return result

    def _ask_first(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self._pipes[0].send((name, arguments))
        return self._pipes[0].recv()


class _Worker:
    def __init__(self, job: Job, number: int) -> None:
        self._dice = random.Random(number)
        self._bundle = load_bundle(job.bundle)
        self._token_ids = TextEncoder(self._bundle).encode(job.texts)
        self._engine = open_engine(self._bundle)
        self._torch: Engine | None = None
        self._wide: Any = None
        self._plain: Any = None
        self._baseline: Any = None

    def sorted(self, seconds: float, budget_tokens: int) -> float:
        return self._rate(self._engine.classify, self._sorted_batches(budget_tokens), seconds)

    def torch(self, seconds: float, bundle: Path, budget_tokens: int) -> float:
        self._torch = self._torch or TorchEngine(load_bundle(bundle))
        return self._rate(self._torch.classify, self._sorted_batches(budget_tokens), seconds)

    def wide(self, seconds: float, budget_tokens: int, threads: int) -> float:
        if self._wide is None:
            self._wide = open_engine(self._bundle, threads)
        return self._rate(self._wide.classify, self._sorted_batches(budget_tokens), seconds)

    def plain(self, seconds: float) -> float:
        self._plain = self._plain or PlainSession(self._bundle.model_path)
        return self._rate(self._plain.classify, _in_groups(self._token_ids), seconds)

    def baseline(self, seconds: float, model: Path, threads: int) -> float:
        self._baseline = self._baseline or PlainSession(model, threads)
        batches = _in_groups(sorted(self._token_ids, key=len))
        self._dice.shuffle(batches)
        return self._rate(self._baseline.classify, batches, seconds)

    def single(self, texts: int) -> list[float]:
        chosen = self._dice.sample(self._token_ids, min(texts, len(self._token_ids)))
        return lone_ms(self._engine.classify, chosen)

    def _sorted_batches(self, budget_tokens: int) -> list[Batch]:
        return sorted_batches(self._token_ids, budget_tokens, self._dice)

    def _rate(self, classify: Classify, batches: list[Batch], seconds: float) -> float:
        for batch in batches[:3]:
            classify(batch)
        return texts_per_s(classify, batches, seconds)


def sorted_batches(token_ids: Sequence[list[int]], budget_tokens: int, dice: random.Random) -> list[Batch]:
    """Batches of like length of at most `budget_tokens` padded tokens, in an order by chance."""
    plan = plan_batches([len(ids) for ids in token_ids], budget_tokens)
    # Shuffled, so that any stretch of time sees short and long texts as often as they occur.
    dice.shuffle(plan)
    return [[token_ids[row] for row in rows] for rows in plan]


def texts_per_s(classify: Classify, batches: Sequence[Batch], seconds: float) -> float:
    """Of `classify` run on `batches`, again from the first after the last, for so long."""
    done = number = 0
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        batch = batches[number % len(batches)]
        classify(batch)
        done += len(batch)
        number += 1
    return done / (now - started)


def lone_ms(classify: Classify, token_ids: Sequence[list[int]]) -> list[float]:
    """Milliseconds of each text, one at a time."""
    samples = []
    for ids in token_ids:
        started = time.perf_counter()
        classify([ids])
        samples.append((time.perf_counter() - started) * 1000)
    return samples


class PlainSession:
    """ONNX Runtime as it comes."""

    def __init__(self, model: Path, threads: int = 0, providers: Sequence[str] | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session: Any = onnxruntime.InferenceSession(str(model), options, providers=providers)

    def classify(self, token_ids: list[list[int]]) -> None:
        inputs = self._session.get_inputs()
        ids, mask = pad(token_ids, np.int32 if inputs[0].type == "tensor(int32)" else np.int64)
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        self._session.run(None, {node.name: values[node.name] for node in inputs})


def _in_groups(token_ids: list[list[int]]) -> list[list[list[int]]]:
    return [token_ids[at : at + PLAIN_BATCH] for at in range(0, len(token_ids), PLAIN_BATCH)]


def _serve(pipe: Connection, job: Job, number: int) -> None:
    worker = _Worker(job, number)
    pipe.send("ready")
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(worker, name)(*arguments))
