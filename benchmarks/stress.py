"""The server under what clients really do: arrivals of their own accord, bulk beside interactive, far too much."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.client import Rows
from benchmarks.load import Load, Target, batch_bodies, play, single_bodies
from benchmarks.measure import Effort, Say
from benchmarks.results import Result, middle
from benchmarks.samples import growth, open_figures, recovery_s
from benchmarks.texts import with_long_texts
from overtone.hardware import usable_cores

BATCH_TEXTS = 256
INTERACTIVE_PER_S = 20.0
OPEN_SHARE = 0.7
"""Of the closed-loop peak: busy, with room for the bursts of random arrivals."""
OVERLOAD = 3.0
CALM_SHARE = 0.5
"""Of the capacity, before and after an overload."""
DEADLINE_S = 30.0
"""Of interactive requests, by the server's defaults."""
GROUP_TEXTS = 16
"""The largest request that counts as interactive."""

_CALM_S = 4.0
_RECOVERY_S = 6.0
_REPLICA = "ray::ServeReplica"


def measure_open(target: Target, texts: list[str], effort: Effort, folder: Path, say: Say) -> dict[str, Result]:
    """p99 of open-loop load at 70 % of the closed-loop peak, for requests of 1, 32 and 256 texts, short and mixed."""
    results: dict[str, Result] = {}
    for kind, chosen in (("tweets", texts), ("mix", with_long_texts(texts))):
        for size in (1, 32, BATCH_TEXTS):
            load = _load(target, chosen, size, folder)
            load.run(_busy(size), effort.warm_up_s)
            samples: list[dict[str, Any]] = []
            for number in range(effort.rounds):
                say(f"open loop, {kind}, {size} texts a request, round {number + 1} of {effort.rounds}")
                peak = load.run(_busy(size), effort.seconds).texts_per_s
                figures = load.run_open(peak * OPEN_SHARE, effort.seconds)
                samples.append({"peak_texts_per_s": peak, "offered_texts_per_s": peak * OPEN_SHARE, **asdict(figures)})
            p99 = [sample["p99_ms"] for sample in samples]
            results[f"serve.open.{kind}.texts{size}.p99_ms"] = Result(middle(p99, 2), "ms", False, {"samples": samples})
    return results


def measure_mixed(target: Target, texts: list[str], effort: Effort, folder: Path, say: Say) -> dict[str, Result]:
    """p99 of single texts beside bulk batches that saturate the server, in units of one engine batch's time."""
    bulk = _load(target, texts, BATCH_TEXTS, folder)
    single = _load(target, texts, 1, folder)
    bulk.run(_busy(BATCH_TEXTS), effort.warm_up_s)
    seconds = 3 * effort.seconds
    rounds: list[dict[str, Any]] = []
    for number in range(effort.rounds):
        say(f"mixed load, round {number + 1} of {effort.rounds}")
        before = _engine_seconds(target)
        streams = [
            bulk.stream("bulk", ((0.0, seconds),), _busy(BATCH_TEXTS)),
            single.stream("interactive", ((INTERACTIVE_PER_S, seconds),)),
        ]
        rows = play(target, streams, folder)
        after = _engine_seconds(target)
        # Without the first second, in which connections are made and the queue fills.
        interactive = rows["interactive"][rows["interactive"][:, 0] >= 1.0]
        figures = open_figures(interactive, 1.0, seconds)
        batch_ms = (after[0] - before[0]) / max(1.0, after[1] - before[1]) * 1000
        bulk_rate = open_figures(rows["bulk"], 0.0, seconds).requests_per_s * BATCH_TEXTS
        rounds.append({"engine_batch_ms": batch_ms, "bulk_texts_per_s": bulk_rate, **asdict(figures)})
    detail = {
        "p99_ms": middle([each["p99_ms"] for each in rounds], 2),
        "engine_batch_ms": middle([each["engine_batch_ms"] for each in rounds], 3),
        "samples": rounds,
    }
    batches = middle([each["p99_ms"] / each["engine_batch_ms"] for each in rounds], 3)
    return {"serve.mixed.interactive_p99_batches": Result(batches, "batches", False, detail)}


def measure_overload(target: Target, texts: list[str], effort: Effort, folder: Path, say: Say) -> dict[str, Result]:
    """Open loop at three times the capacity: what is still answered, how the rest is refused, and what comes after.

    Single texts are what clients send, but the generator and the refusals then take much of the same cores that the
    engine runs on; with 16 texts a request, which are as interactive, what is seen is the server's own behaviour.
    """
    results: dict[str, Result] = {}
    for name, size in (("serve.overload", GROUP_TEXTS), ("serve.overload.single", 1)):
        load = _load(target, texts, size, folder)
        load.run(_busy(size), effort.warm_up_s)
        say(f"{name}: capacity")
        capacity = _capacity(load, size, effort)
        say(f"{name}: {effort.overload_s:.0f} s at {OVERLOAD:g} times {capacity:.0f} texts/s")
        calm, much = CALM_SHARE * capacity / size, OVERLOAD * capacity / size
        phases = ((calm, _CALM_S), (much, effort.overload_s), (calm, _RECOVERY_S))
        with MemoryWatch() as memory:
            rows = play(target, [load.stream("overload", phases)], folder)["overload"]
        say(f"{name}: capacity again")
        capacities = (capacity, _capacity(load, size, effort))
        results |= _overload_results(name, rows, effort.overload_s, size, capacities, memory.samples)
    return results


def _capacity(load: Load, size: int, effort: Effort) -> float:
    return middle([load.run(_busy(size), effort.seconds).texts_per_s for _ in range(3)], 1)


def _overload_results(
    name: str, rows: Rows, seconds: float, size: int, capacities: tuple[float, float], memory: dict[int, list[float]]
) -> dict[str, Result]:
    start, end = _CALM_S, _CALM_S + seconds
    calm = open_figures(rows, 1.0, start)
    # The first second fills the queue.
    during = open_figures(rows, start + 1.0, end)
    usual_ms = max(3 * calm.p99_ms, 100.0)
    goodput = during.requests_per_s * size
    growths = [growth(samples) for samples in memory.values()]
    detail = {
        "capacity_texts_per_s": capacities,
        "goodput_texts_per_s": round(goodput, 1),
        "seconds": seconds,
        "texts_a_request": size,
        "calm": asdict(calm),
        "during": asdict(during),
        "usual_ms": usual_ms,
        "answered_after_deadline": int(((rows[:, 3] == 200) & (rows[:, 2] - rows[:, 1] > DEADLINE_S)).sum()),
        "replica_memory_mib": {str(pid): samples for pid, samples in memory.items()},
    }
    return {
        f"{name}.goodput_ratio": Result(round(goodput / fmean(capacities), 4), "ratio", True, detail),
        f"{name}.recovery_s": Result(recovery_s(rows, end, usual_ms), "s", False),
        f"{name}.refusal_p99_ms": Result(during.refusal_p99_ms, "ms", False),
        f"{name}.memory_growth": Result(max(growths, default=0.0), "share", False, {"samples": growths}),
    }


class MemoryWatch:
    """Notes the memory of every Serve replica of this machine, every half second, while it is open."""

    def __init__(self) -> None:
        self.samples: dict[int, list[float]] = {}
        """MiB by process id."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _watch(self) -> None:
        processes = replicas()
        while not self._stop.wait(0.5):
            for process in processes:
                with suppress(psutil.Error):
                    mib = process.memory_info().rss / 2**20
                    self.samples.setdefault(process.pid, []).append(round(mib, 1))


def replicas() -> Sequence[psutil.Process]:
    """The processes of Serve replicas on this machine."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (process.cmdline() or [""])[0].startswith(_REPLICA):
                found.append(process)
    return found


def _load(target: Target, texts: list[str], size: int, folder: Path) -> Load:
    if size == 1:
        return Load(target, "/predict", single_bodies(texts), 1, folder)
    return Load(target, "/predict/batch", batch_bodies(texts, size), size, folder)


def _busy(size: int) -> int:
    """Connections that keep the server busy with requests of `size` texts."""
    return 64 if size == 1 else max(2, 128 // size) * usable_cores()


def _engine_seconds(target: Target) -> tuple[float, float]:
    """Seconds in the engine and batches, of all replicas since they started."""
    # The replicas write their figures down at moments of their own.
    time.sleep(0.2)
    headers = {target.key_header: target.key}
    families = text_string_to_metric_families(httpx.get(f"{target.url}/metrics", headers=headers, timeout=30).text)
    totals: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    name = "overtone_serve_engine_seconds"
    return totals.get(f"{name}_sum", 0.0), totals.get(f"{name}_count", 0.0)
