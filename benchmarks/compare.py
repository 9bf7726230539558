"""Overtone and each peer in turn: ours, a peer, ours, the next peer, ours again; never two servers at once."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.load import Load, Outcome, Target, batch_bodies, in_groups, single_bodies
from benchmarks.measure import Effort, Say
from benchmarks.peers.catalogue import Peer
from benchmarks.peers.running import AGREEMENT, agreement, prepared, running
from benchmarks.results import Result, ratio
from benchmarks.samples import Figures
from benchmarks.stress import OPEN_SHARE
from overtone.bundle import Bundle
from overtone.errors import OvertoneError, UnavailableError
from overtone.settings import Settings

SINGLE_CONNECTIONS = (1, 8, 64, 256)
BATCHES = {32: 16, 256: 4}
"""Texts a request, and connections."""
CHECKED_TEXTS = 512

OwnServer = Callable[[], AbstractContextManager[Target]]


@dataclass(slots=True)
class Side:
    """One server, measured once."""

    single: dict[int, Outcome] = field(default_factory=dict)
    """By connections."""
    batch: dict[int, Outcome] = field(default_factory=dict)
    """By texts a request."""
    at_rate: Figures | None = None
    """Single texts in open loop, at 70 % of what the peer's best was."""
    failures: dict[str, str] = field(default_factory=dict)
    """What it could not do, and why."""

    @property
    def best_single(self) -> float:
        """Texts a second at the number of connections that suits it best."""
        return max((outcome.texts_per_s for outcome in self.single.values()), default=0.0)

    @property
    def best_batch(self) -> float:
        """Texts a second with the size of requests that suits it best."""
        return max((outcome.texts_per_s for outcome in self.batch.values()), default=0.0)


@dataclass(frozen=True, slots=True)
class Trial:
    """A peer between two measurements of ours."""

    before: Side
    theirs: Side
    after: Side


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is the same for all servers."""

    settings: Settings
    bundle: Bundle
    texts: list[str]
    effort: Effort
    own_server: OwnServer

    def run(self, peers: Sequence[Peer], say: Say) -> tuple[dict[str, Result], dict[str, str]]:
        """The results of the peers that could be measured, and why the others could not."""
        trials: dict[str, list[Trial]] = defaultdict(list)
        unavailable: dict[str, str] = {}
        for number in range(self.effort.rounds):
            left = [peer for peer in peers if peer.name not in unavailable]
            if not left:
                break
            say(f"peers, round {number + 1} of {self.effort.rounds}: Overtone")
            before = self._ours(None)
            for peer in left:
                say(f"peers, round {number + 1} of {self.effort.rounds}: {peer.title}")
                try:
                    theirs = self._theirs(peer)
                except (OvertoneError, OSError) as error:
                    unavailable[f"peers.{peer.name}"] = str(error)
                    continue
                say(f"peers, round {number + 1} of {self.effort.rounds}: Overtone after {peer.title}")
                after = self._ours(theirs.best_single * OPEN_SHARE)
                trials[peer.name].append(Trial(before, theirs, after))
                before = after
        results: dict[str, Result] = {}
        for peer in peers:
            results |= trial_results(peer, trials[peer.name])
        return results, unavailable

    def _ours(self, rate: float | None) -> Side:
        with self.own_server() as target, tempfile.TemporaryDirectory(prefix="ovl-") as folder:
            place = Path(folder)
            single = Load(target, "/predict", single_bodies(self.texts), 1, place)
            batches = {
                size: Load(target, "/predict/batch", batch_bodies(self.texts, size), size, place) for size in BATCHES
            }
            return self._measure(single, batches, rate)

    def _theirs(self, peer: Peer) -> Side:
        texts = prepared(peer, self.texts)
        with (
            tempfile.TemporaryDirectory(prefix="ovp-", ignore_cleanup_errors=True) as folder,
            running(peer, self.settings, Path(folder)) as url,
        ):
            share = agreement(peer, url, self.bundle, self.texts[:CHECKED_TEXTS])
            if share < AGREEMENT:
                raise UnavailableError(f"gives our label to {share:.1%} of the texts only; at least {AGREEMENT:.0%}")
            target = Target(url, "X-API-Key", "none")
            single = Load(target, peer.path, [peer.body([text]) for text in texts], 1, Path(folder))
            batches = {
                size: Load(
                    target, peer.path, [peer.body(group) for group in in_groups(texts, size)], size, Path(folder)
                )
                for size in BATCHES
            }
            return self._measure(single, batches, None, own_rate=True)

    def _measure(self, single: Load, batches: dict[int, Load], rate: float | None, own_rate: bool = False) -> Side:
        side = Side()
        seconds = self.effort.seconds
        single.run(SINGLE_CONNECTIONS[1], self.effort.warm_up_s)
        for connections in SINGLE_CONNECTIONS:
            with _noting(side, f"single.c{connections}"):
                side.single[connections] = single.run(connections, seconds)
        for size, load in batches.items():
            with _noting(side, f"batch{size}"):
                side.batch[size] = load.run(BATCHES[size], seconds)
        if own_rate:
            rate = side.best_single * OPEN_SHARE
        if rate:
            with _noting(side, "open"):
                side.at_rate = single.run_open(rate, 2 * seconds)
        return side


class _noting:  # noqa: N801  # reads as the verb it is
    """Writes a failure down with the side it belongs to, so that the other figures stand."""

    def __init__(self, side: Side, what: str) -> None:
        self._side = side
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, OvertoneError):
            self._side.failures[self._what] = error.message
            return True
        return False


def trial_results(peer: Peer, trials: Sequence[Trial]) -> dict[str, Result]:
    """The ratios of `peer`, ours over theirs; a kind of load that it never managed has none."""
    detail = {
        "title": peer.title,
        "tuning": list(peer.tuning),
        "trials": [asdict(trial) for trial in trials],
    }
    results: dict[str, Result] = {}
    singles = [trial for trial in trials if trial.theirs.best_single]
    if singles:
        ours = [fmean((trial.before.best_single, trial.after.best_single)) for trial in singles]
        results[f"peers.{peer.name}.single.ratio"] = ratio(ours, [t.theirs.best_single for t in singles], **detail)
    batches = [trial for trial in trials if trial.theirs.best_batch]
    if batches:
        ours = [fmean((trial.before.best_batch, trial.after.best_batch)) for trial in batches]
        results[f"peers.{peer.name}.batch.ratio"] = ratio(ours, [t.theirs.best_batch for t in batches])
    rated = [(t.after.at_rate, t.theirs.at_rate) for t in trials if t.after.at_rate and t.theirs.at_rate]
    if rated:
        pairs: list[dict[str, Any]] = [{"ours_ms": a.p99_ms, "theirs_ms": b.p99_ms} for a, b in rated]
        p99 = ratio([a.p99_ms for a, _ in rated], [b.p99_ms for _, b in rated], pairs=pairs)
        results[f"peers.{peer.name}.p99.ratio"] = Result(p99.value, "ratio", False, p99.detail)
    return results
