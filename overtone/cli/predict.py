"""`overtone predict`: texts from the command line or from a file, classified by the running API or in this process."""

import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ingest.predict import Outcome, Postponed, PredictClient, client_for
from overtone.bundle import TextEncoder, load_bundle, to_prediction
from overtone.cli.rows import Row, Unreadable, find_end, open_rows, skip_done
from overtone.cli.status import served_version
from overtone.engine import open_engine
from overtone.errors import InvalidInputError, OverloadedError, UnavailableError
from overtone.schema import Prediction
from overtone.settings import Settings
from serve.bodies import text_problem

_BATCH_ROWS = 256
_ENGINE_ROWS = 32
_UNDER_WAY = 3
_TIMEOUT_S = 600.0
_TRIES = 8
_MAX_WAIT_S = 15.0
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class FileJob:
    """A file of texts and where its predictions go."""

    source: str
    """Path, or `-` for standard input."""
    output: Path | None
    """None for standard output."""
    column: str = "text"


class Predictor(Protocol):
    """Classifies texts that keep to the limits."""

    async def classify(self, texts: Sequence[str]) -> list[Outcome]:
        """One outcome a text, in order."""


class RemotePredictor:
    """The API; it is asked again while it is full or away."""

    def __init__(self, client: PredictClient, *, first_wait_s: float = 0.5) -> None:
        self._client = client
        self._first_wait_s = first_wait_s

    async def classify(self, texts: Sequence[str]) -> list[Outcome]:
        """See `Predictor`.

        Raises:
            UnavailableError: it stayed away.
            UnauthorizedError, InvalidInputError: it refuses.
        """
        outcomes: list[Outcome] = [Postponed("not asked")] * len(texts)
        wait_s = self._first_wait_s
        for attempt in range(1, _TRIES + 1):
            missing = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Postponed)]
            if not missing:
                break
            try:
                answers = await self._client.predict([texts[index] for index in missing])
                for index, answer in zip(missing, answers, strict=True):
                    outcomes[index] = answer
                if not any(isinstance(answer, Postponed) for answer in answers):
                    break
            except (OverloadedError, UnavailableError):
                if attempt == _TRIES:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _MAX_WAIT_S)
        return outcomes


class LocalPredictor:
    """The bundle, in this process."""

    def __init__(self, settings: Settings, threads: int) -> None:
        self._bundle = load_bundle(settings.bundle)
        self._encoder = TextEncoder(self._bundle)
        self._engine = open_engine(self._bundle, threads, wanted=settings.engine, built=settings.tensorrt_folder)

    async def classify(self, texts: Sequence[str]) -> list[Outcome]:
        """See `Predictor`."""
        return await asyncio.to_thread(self._classify, texts)

    def _classify(self, texts: Sequence[str]) -> list[Outcome]:
        ids = self._encoder.encode(texts)
        # Neighbours of one length need no padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        outcomes: dict[int, Outcome] = {}
        for start in range(0, len(order), _ENGINE_ROWS):
            chosen = order[start : start + _ENGINE_ROWS]
            for index, row in zip(chosen, self._engine.classify([ids[index] for index in chosen]), strict=True):
                outcomes[index] = to_prediction(self._bundle, row)
        return [outcomes[index] for index in range(len(ids))]


def predict_texts(settings: Settings, texts: Sequence[str], console: Console, *, is_local: bool, as_json: bool) -> int:
    """Classify `texts` and show the predictions; 0 when all could be classified.

    Raises:
        InvalidInputError: a text breaks a limit.
    """
    for number, text in enumerate(texts, 1):
        problem = text_problem(text, f"text {number}")
        if problem:
            raise InvalidInputError(f"{problem.field} {problem.problem}.")

    async def work() -> list[Outcome]:
        async with _predictor(settings, is_local=is_local) as predictor:
            return await predictor.classify(texts)

    outcomes = asyncio.run(work())
    for number, (text, outcome) in enumerate(zip(texts, outcomes, strict=True)):
        record = as_record(number, text, outcome)
        if as_json:
            console.print(json.dumps(record, ensure_ascii=False), soft_wrap=True, markup=False, highlight=False)
        elif isinstance(outcome, Prediction):
            console.print(Text(f"{outcome.label:<9} {outcome.confidence:.3f}  {text}"), soft_wrap=True)
        else:
            console.print(Text(f"{'failed':<9} {outcome.reason}  {text}"), soft_wrap=True)
    return 0 if all(isinstance(outcome, Prediction) for outcome in outcomes) else 1


def predict_file(settings: Settings, job: FileJob, *, is_local: bool) -> int:
    """Classify the rows of `job`, going on where its output ends; 0 when that is done.

    Rows that cannot be classified get a line with an `error` in the output.

    Raises:
        ConfigurationError: the input cannot be read, or the output was made from another one.
        UnavailableError: the API went away; the same command goes on from there.
    """
    return asyncio.run(_predict_file(settings, job, is_local=is_local))


def as_record(number: int, text: Row, outcome: Outcome | Unreadable) -> dict[str, Any]:
    """The line of the output for row `number`."""
    if isinstance(outcome, Prediction):
        scores = {label: round(score, _DIGITS) for label, score in outcome.scores.items()}
        fields = asdict(outcome) | {"confidence": round(outcome.confidence, _DIGITS), "scores": scores}
        return {"row": number, "text": text, **fields}
    reason = outcome.problem if isinstance(outcome, Unreadable) else outcome.reason
    return {"row": number, "error": reason}


async def _predict_file(settings: Settings, job: FileJob, *, is_local: bool) -> int:
    begun = find_end(job.output) if job.output else None
    with open_rows(job.source, job.column) as file:
        rows = file.rows()
        if begun and job.output:
            skip_done(rows, begun, job.output)
        first = begun.rows if begun else 0
        with _progress() as progress, _open_output(job.output) as output:
            bar = progress.add_task("classifying", total=file.size, rows=first, failed=0)
            failed = 0
            async with _predictor(settings, is_local=is_local) as predictor:
                async for number, row, outcome in _in_order(predictor, rows, first):
                    failed += not isinstance(outcome, Prediction)
                    output.write(json.dumps(as_record(number, row, outcome), ensure_ascii=False) + "\n")
                    if (number + 1) % _BATCH_ROWS == 0:
                        output.flush()
                        progress.update(bar, completed=file.position, rows=number + 1, failed=failed)
            progress.update(bar, completed=file.size or 0)
    return 0


async def _in_order(
    predictor: Predictor, rows: Iterator[Row], first: int
) -> AsyncIterator[tuple[int, Row, Outcome | Unreadable]]:
    """Number, row and outcome of each of `rows`, several batches under way at a time."""
    under_way: deque[tuple[list[Row], asyncio.Task[list[Outcome | Unreadable]]]] = deque()
    number = first
    try:
        while True:
            batch = list(islice(rows, _BATCH_ROWS))
            if batch:
                under_way.append((batch, asyncio.create_task(_outcomes(predictor, batch))))
            if under_way and (not batch or len(under_way) >= _UNDER_WAY):
                done, task = under_way.popleft()
                for row, outcome in zip(done, await task, strict=True):
                    yield number, row, outcome
                    number += 1
            elif not batch:
                return
    finally:
        for _, task in under_way:
            task.cancel()


async def _outcomes(predictor: Predictor, batch: Sequence[Row]) -> list[Outcome | Unreadable]:
    checked: list[Unreadable | None] = []
    for row in batch:
        if isinstance(row, Unreadable):
            checked.append(row)
        else:
            problem = text_problem(row)
            checked.append(Unreadable(f"the text {problem.problem}") if problem else None)
    texts = [row for row, problem in zip(batch, checked, strict=True) if problem is None]
    answers = iter(await predictor.classify(texts) if texts else [])
    return [next(answers) if problem is None else problem for problem in checked]


@asynccontextmanager
async def _predictor(settings: Settings, *, is_local: bool) -> AsyncIterator[Predictor]:
    if is_local or served_version(settings) is None:
        yield LocalPredictor(settings, _cores())
        return
    async with client_for(settings, _TIMEOUT_S) as client:
        yield RemotePredictor(client)


def _cores() -> int:
    import psutil

    return min(8, psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)


def _open_output(path: Path | None) -> Any:
    if path is None:
        return nullcontext(sys.stdout)
    path.parent.mkdir(parents=True, exist_ok=True)
    file: TextIO = path.open("a", encoding="utf-8")
    return file


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows, {task.fields[failed]:,} failed"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
