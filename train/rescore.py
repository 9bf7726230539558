"""`python -m train.rescore`: predictions by the champion for posts that were stored before it was.

A Ray Data job of three stages (`train.stages`): one actor reads posts, as many as are asked for classify them, one
writes. It keeps three connections to PostgreSQL, whatever the number of workers. What is left to do is whatever lacks a
prediction by the version, so a run that was killed is continued by giving the command again, and a run too many does
nothing.
"""

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import ray
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from overtone.bundle import Bundle, load_bundle
from overtone.db.database import Database
from overtone.db.embedded import url_of
from overtone.db.rescoring import Plan, only_rescoring, plan_rescoring
from overtone.errors import BundleError, ConfigurationError, EngineError, EnvironmentProblemError, OvertoneError
from overtone.logging import configure
from overtone.registry import Registry, is_in_use
from overtone.settings import Settings, load_settings, set_default_environment
from train.cluster import quiet_data_context, ray_cluster
from train.exits import as_exit_code
from train.stages import APPLICATION, PostReader, PredictionWriter, Scorer

if TYPE_CHECKING:
    from ray.data import Dataset

_NO_PROGRESS_S = 900.0
"""After which a run that finishes nothing is given up: no free CPU on the cluster, or a database that stays away."""
_LINE_EVERY_S = 5.0
_EVEN_S = 10.0
"""Within so many seconds the rate is kept: what is behind a slice waits for that long at most."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Wanted:
    """What to re-score, and how hard."""

    since: datetime | None = None
    """Only posts made since then."""
    workers: int = 1
    """Processes that classify, of one thread each."""
    cpus: float = 1.0
    """CPUs of the Ray cluster that each of them takes; 0 lets them run where all are taken."""
    rate: float | None = None
    """Posts a second at most, over all of them."""
    slice_posts: int = 2_000
    """Posts a read and a transaction, if the rate lets so many through in `_EVEN_S`."""
    is_dry_run: bool = False

    @property
    def rows(self) -> int:
        """Posts a slice."""
        return min(self.slice_posts, max(int(self.rate * _EVEN_S), 1)) if self.rate else self.slice_posts


@dataclass(frozen=True)
class Report:
    """What a run has done so far."""

    model_version: str
    stored: int
    """Posts looked at."""
    planned: int
    """Posts without a prediction by this version when the run began."""
    read: int = 0
    written: int = 0
    """Predictions stored; the rest of what was read was erased meanwhile, or classified by another process."""
    failed: int = 0
    """Posts that the model fails on."""
    seconds: float = 0.0

    @property
    def posts_per_s(self) -> float:
        """Posts read a second."""
        return self.read / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 3), "posts_per_s": round(self.posts_per_s, 1)}


Follow = Callable[[Report], None]


def champion(settings: Settings) -> Bundle:
    """The champion of the registry; where there is none, the bundle that a fresh start serves.

    Raises:
        BundleError: it does not load.
        UnavailableError: the registry cannot be reached.
    """
    registry = Registry(settings) if is_in_use(settings) else None
    found = registry.find("champion") if registry else None
    return registry.fetch(found) if registry and found else load_bundle(settings.bundle)


def rescore(settings: Settings, bundle: Bundle, wanted: Wanted, address: str | None, follow: Follow) -> Report:
    """Give every post that lacks one a prediction by `bundle`; `follow` is called with the plan, then after each
    transaction.

    Works on the Ray cluster at `address`, whose machines find the database by settings of their own, or on one of its
    own.

    Raises:
        ConfigurationError: there is no database.
        DatabaseUnavailableError: it stayed away; give the command again to go on.
        EnvironmentProblemError: Ray, or what it needs for this, is not there.
        UnavailableError: another process re-scores with this bundle; a dry run does not mind.
    """
    url = url_of(settings)
    with asyncio.Runner() as runner:
        if wanted.is_dry_run:
            return _planned(bundle, runner.run(_plan(url, bundle.version, wanted)))
        with _only(runner, url, bundle.version):
            plan = runner.run(_plan(url, bundle.version, wanted))
            report = _planned(bundle, plan)
            follow(report)
            if not plan.slices:
                return report
            # Ray's core complains on the terminal of how Ray Data starts its actors.
            set_default_environment(RAY_BACKEND_LOG_LEVEL="fatal")
            with ray_cluster(address):
                return _run(settings, bundle, wanted, plan, report, follow)


def _planned(bundle: Bundle, plan: Plan) -> Report:
    return Report(bundle.version, plan.stored, plan.posts)


@contextmanager
def _only(runner: asyncio.Runner, url: str, model_version: str) -> Iterator[None]:
    """The block, while no other process re-scores with this version."""
    stack = AsyncExitStack()

    async def enter() -> None:
        db = await stack.enter_async_context(_opened(url))
        await stack.enter_async_context(only_rescoring(db, model_version))

    try:
        runner.run(enter())
        yield
    finally:
        runner.run(stack.aclose())


async def _plan(url: str, model_version: str, wanted: Wanted) -> Plan:
    async with _opened(url) as db:
        return await plan_rescoring(db, model_version, since=wanted.since, rows=wanted.rows)


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Database]:
    db = await Database.open(url, max_size=1, application_name=APPLICATION)
    try:
        yield db
    finally:
        await db.close()


def _run(settings: Settings, bundle: Bundle, wanted: Wanted, plan: Plan, report: Report, follow: Follow) -> Report:
    dataset = _dataset(settings, bundle, wanted, plan)
    started = time.monotonic()
    try:
        # One block a transaction: what is written is counted as soon as it is.
        for counts in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            added = {name: getattr(report, name) + int(counts[name].sum()) for name in ("read", "written", "failed")}
            report = replace(report, **added, seconds=time.monotonic() - started)
            follow(report)
    except Exception as error:
        raise _cause(error) from error
    return report


def _dataset(settings: Settings, bundle: Bundle, wanted: Wanted, plan: Plan) -> "Dataset":
    """The three stages over the slices of `plan`, the newest posts first; nothing runs yet."""
    try:
        import ray.data
    except ImportError as error:
        raise EnvironmentProblemError(f"{error.name} is not installed; pip install 'overtone[train]'") from None
    from ray.data import ActorPoolStrategy

    quiet_data_context().execution_no_progress_timeout_s = _NO_PROGRESS_S
    files = ray.put({name: (bundle.path / name).read_bytes() for name in bundle.files})
    one, gpus = ActorPoolStrategy(size=1), _gpus(settings, bundle, wanted.workers)
    spans = [{"first": one.first, "last": one.last} for one in reversed(plan.slices)]
    return (
        ray.data.from_items(spans, override_num_blocks=len(spans))
        .map_batches(PostReader, fn_constructor_args=(bundle.version, wanted.rate), compute=one, num_cpus=0)
        .map_batches(
            Scorer,
            fn_constructor_args=(files,),
            compute=ActorPoolStrategy(size=wanted.workers),
            num_cpus=wanted.cpus,
            num_gpus=gpus,
        )
        .map_batches(PredictionWriter, fn_constructor_args=(bundle.version, bundle.labels), compute=one, num_cpus=0)
    )


def _gpus(settings: Settings, bundle: Bundle, workers: int) -> int:
    """GPUs a worker: one where the bundle can use it and the cluster has enough of them."""
    can_use = settings.engine == "torch" or (bundle.precision != "int8" and settings.engine != "onnx-cpu")
    return int(can_use and ray.cluster_resources().get("GPU", 0) >= workers)


def _cause(error: BaseException) -> OvertoneError:
    """The error of ours that a stage raised, or one that tells what Ray says."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OvertoneError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    lines = str(error).strip().splitlines()
    return OvertoneError(f"re-scoring failed: {lines[-1] if lines else type(error).__name__}")


@contextmanager
def showing(console: Console, *, as_json: bool) -> Iterator[Follow]:
    """Takes the reports of a run: a bar on a terminal, a line every few seconds elsewhere, in JSON if so asked."""
    if console.is_terminal and not as_json:
        with _bar(console) as follow:
            yield follow
        return
    last = -math.inf

    def as_line(report: Report) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            if as_json:
                _print_json("rescore.progress", report)
            else:
                console.print(_line(report), highlight=False, soft_wrap=True)

    yield as_line


@contextmanager
def _bar(console: Console) -> Iterator[Follow]:
    columns = (
        TextColumn("re-scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]} posts/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None, speed="-")
        yield lambda report: bar.update(
            task, total=report.planned, completed=report.read, speed=f"{report.posts_per_s:.0f}"
        )


def conclude(console: Console, report: Report, *, is_dry_run: bool, as_json: bool) -> None:
    """Tell the end of a run.

    Raises:
        EngineError: the model failed on posts; all others have their predictions.
    """
    if as_json:
        _print_json("rescore.planned" if is_dry_run else "rescore.done", report)
    elif is_dry_run or not report.planned:
        lacking = f"{report.planned} of {report.stored}" if report.planned else f"none of {report.stored}"
        console.print(f"{lacking} stored posts lack a prediction by {report.model_version}", highlight=False)
    else:
        console.print(_line(report), highlight=False, soft_wrap=True)
    if report.failed:
        raise EngineError(f"The model failed on {report.failed} posts; all others have their predictions.")


def _line(report: Report) -> str:
    return (
        f"{report.model_version}: {report.read}/{report.planned} posts read, {report.written} predictions written, "
        f"{report.posts_per_s:.0f} posts/s"
    )


def _print_json(event: str, report: Report) -> None:
    sys.stdout.buffer.write(orjson.dumps({"event": event, **report.as_dict()}) + b"\n")
    sys.stdout.flush()


@app.command()
def command(  # noqa: PLR0913, PLR0917 - flags of the command line
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of the bundle. Default: the champion of the registry, or BUNDLE.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Only posts made since then (UTC).")] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that classify.")] = 1,
    cpus: Annotated[
        float, typer.Option(min=0, help="CPUs of the cluster that each takes; 0: runs where all are taken.")
    ] = 1.0,
    rate: Annotated[float | None, typer.Option(min=1, help="Posts a second at most.")] = None,
    slice_posts: Annotated[int, typer.Option(min=1, max=10_000, help="Posts a read and a transaction.")] = 2_000,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to work on. Default: one of this process's own."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what there is to do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print lines of JSON.")] = False,
) -> None:
    """Give stored posts predictions by the champion. A run that was cut off is continued by the same command.

    Exit code 0: done; 2: a wrong option, setting or bundle; 1: anything else.
    """
    with as_exit_code(ConfigurationError, BundleError) as console:
        settings = load_settings()
        configure("rescore", settings.log_level, settings.log_format)
        chosen = load_bundle(bundle) if bundle else champion(settings)
        start = since.replace(tzinfo=UTC) if since and since.tzinfo is None else since
        wanted = Wanted(start, workers, cpus, rate, slice_posts, dry_run)
        with showing(console, as_json=as_json) as follow:
            report = rescore(settings, chosen, wanted, address, follow)
        conclude(console, report, is_dry_run=dry_run, as_json=as_json)


if __name__ == "__main__":
    app()
