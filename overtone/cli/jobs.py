"""`overtone jobs`: what is done in the background, through the API: files of texts, stored posts, reports."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO
from uuid import uuid4

import typer
from rich.console import Console

from overtone.schema import MAX_REPORT_DAYS, MAX_SINCE_DAYS, REPORT_DAYS

if TYPE_CHECKING:
    import httpx

    from overtone.settings import Settings

app = typer.Typer(help="Work in the background: files of texts, stored posts, reports.", no_args_is_help=True)

MEDIA = {
    ".ndjson": "application/x-ndjson",
    ".jsonl": "application/x-ndjson",
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
}
_PIECE_BYTES = 256 * 1024
_LOOK_S = 1.0
_PATIENCE_S = 120.0
"""How long a wait goes on while the API does not answer."""
_ENDED = ("succeeded", "failed", "cancelled")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait until it has ended; exit code 10 unless it succeeded.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where the result goes, as JSON lines.")
]


@app.command("submit")
def submit(  # noqa: PLR0913, PLR0917  (one argument an option)
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Texts: .ndjson, .jsonl, .csv or .tsv.")],
    text_column: Annotated[str, typer.Option(help="Column or field that holds the text.")] = "text",
    reject: Annotated[
        bool, typer.Option("--reject", help="Refuse the file if a line is wrong, instead of giving it an error.")
    ] = False,
    top_k: Annotated[int | None, typer.Option(min=1, help="Show so many labels, the best first.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Give a label only with so much confidence.")
    ] = None,
    long_text: Annotated[str | None, typer.Option(help="truncate, reject or window.")] = None,
    wait: Wait = False,
    output: Output = None,
    as_json: AsJson = False,
) -> int:
    """Upload a file. With --wait or --output, wait for the end; with --output, fetch the result too."""
    from overtone.errors import ConfigurationError

    media = MEDIA.get(file.suffix.lower())
    if media is None:
        raise ConfigurationError(f"{file}: the name must end in one of {', '.join(MEDIA)}.")
    _require_new(output)
    query = {"column": text_column, "invalid": "reject" if reject else "keep"}
    given = {"top_k": top_k, "threshold": threshold, "long_text": long_text}
    query |= {name: str(value) for name, value in given.items() if value is not None}
    with _client() as client:
        job = _upload(client, file, media, query)
        if wait or output is not None:
            if not as_json:
                Console(stderr=True).print(f"Job {job['job_id']}.", highlight=False)
            job = _await(client, job["job_id"])
        if output is not None and job["state"] == "succeeded":
            _fetch(client, job["job_id"], output)
    return _told(job, as_json=as_json, was_awaited=wait or output is not None)


@app.command("rescore")
def rescore(
    since_days: Annotated[
        int | None, typer.Option(min=1, max=MAX_SINCE_DAYS, help="Only posts made within so many days [default: all].")
    ] = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> int:
    """Give stored posts predictions by the model that is served now; see also `overtone rescore`."""
    return _made("rescoring", {"since_days": since_days}, wait=wait, as_json=as_json)


@app.command("report")
def report(
    days: Annotated[int, typer.Option(min=1, max=MAX_REPORT_DAYS, help="So many days until now.")] = REPORT_DAYS,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", "-w", help="Wait for it; exit code 10 unless it is made.")
    ] = True,
    as_json: AsJson = False,
) -> int:
    """Tell in numbers what happened in the last days."""
    return _made("report", {"days": days}, wait=wait, as_json=as_json)


@app.command("list")
def list_jobs(
    newest: Annotated[int, typer.Option("--newest", "-n", min=1, max=1000, help="How many.")] = 20,
    as_json: AsJson = False,
) -> int:
    """Show the newest jobs."""
    from rich.table import Table

    with _client() as client:
        found = _asked(client, "GET", "/jobs", params={"limit": newest})["jobs"]
    console = Console()
    if as_json:
        console.print_json(json.dumps(found))
        return 0
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("job", "kind", "state", "done", "items", "failed", "created"):
        table.add_column(column)
    for job in found:
        done = f"{job['progress']:.0%}"
        counts = "-" if job["total"] is None else f"{job['total']:,}", f"{job['failed']:,}"
        created = job["created_at"][:19].replace("T", " ")
        table.add_row(job["job_id"], job["kind"], job["state"], done, *counts, created)
    console.print(table)
    return 0


@app.command("status")
def status(job: JobId, wait: Wait = False, as_json: AsJson = False) -> int:
    """Show how far a job is."""
    with _client() as client:
        found = _await(client, job) if wait else _asked(client, "GET", f"/jobs/{job}")
    return _told(found, as_json=as_json, was_awaited=wait)


@app.command("result")
def result(job: JobId, output: Output = None) -> int:
    """Fetch the result of a job that has ended: a line for each line of the upload, in its order."""
    _require_new(output)
    with _client() as client:
        _fetch(client, job, output)
    return 0


@app.command("cancel")
def cancel(job: JobId, as_json: AsJson = False) -> int:
    """End a job; what is done of it stays."""
    with _client() as client:
        found = _asked(client, "POST", f"/jobs/{job}/cancel")
    return _told(found, as_json=as_json)


@app.command("resume")
def resume(job: JobId, wait: Wait = False, as_json: AsJson = False) -> int:
    """Go on with a job that has failed, where it stopped."""
    with _client() as client:
        found = _asked(client, "POST", f"/jobs/{job}/resume")
        found = _await(client, job) if wait else found
    return _told(found, as_json=as_json, was_awaited=wait)


@app.command("delete")
def delete(job: JobId) -> int:
    """End a job if it is under way, and remove it and its result."""
    with _client() as client:
        _asked(client, "DELETE", f"/jobs/{job}")
    Console().print("Deleted.")
    return 0


def _made(name: str, body: dict[str, Any], *, wait: bool, as_json: bool) -> int:
    given = {field: value for field, value in body.items() if value is not None}
    with _client() as client:
        job = _asked(client, "POST", f"/jobs/{name}", json=given, headers={"Idempotency-Key": uuid4().hex})
        job = _await(client, job["job_id"]) if wait else job
    return _told(job, as_json=as_json, was_awaited=wait)


@contextmanager
def _client() -> "Iterator[httpx.Client]":
    import httpx

    from overtone.errors import UnavailableError
    from overtone.logging import configure
    from overtone.settings import load_settings

    configure("cli", "ERROR", "console")
    settings: Settings = load_settings()
    headers = {settings.api_key_header: settings.read_api_key()}
    timeout = httpx.Timeout(120.0, connect=5.0)
    with httpx.Client(base_url=settings.api_url, headers=headers, timeout=timeout, trust_env=False) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"The API at {client.base_url} cannot be reached: {type(error).__name__}."
            ) from error


def _upload(client: "httpx.Client", file: Path, media: str, query: dict[str, str]) -> dict[str, Any]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from overtone.errors import ConfigurationError

    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            file.open("rb") as body,
            Progress(*columns, console=_errors(), disable=not sys.stderr.isatty()) as progress,
        ):
            bar = progress.add_task("uploading", total=file.stat().st_size)

            def pieces(source: BinaryIO) -> Iterator[bytes]:
                while piece := source.read(_PIECE_BYTES):
                    yield piece
                    progress.advance(bar, len(piece))

            headers = {"Content-Type": media, "Idempotency-Key": uuid4().hex}
            return _asked(client, "POST", "/jobs", params=query, content=pieces(body), headers=headers)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}.") from error


def _await(client: "httpx.Client", job_id: str) -> dict[str, Any]:
    """The job when it has ended; an API that is away for a while is waited for."""
    import httpx
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from overtone.errors import OverloadedError, UnavailableError

    columns = (TextColumn("{task.fields[state]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    answered = time.monotonic()
    with Progress(*columns, console=_errors(), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("working", total=None, state="queued")
        while True:
            try:
                job = _asked(client, "GET", f"/jobs/{job_id}")
            except (httpx.HTTPError, OverloadedError, UnavailableError):
                if time.monotonic() - answered > _PATIENCE_S:
                    raise
            else:
                answered = time.monotonic()
                progress.update(bar, completed=job["done"], total=job["total"], state=job["state"])
                if job["state"] in _ENDED:
                    return job
            time.sleep(_LOOK_S)


def _fetch(client: "httpx.Client", job_id: str, output: Path | None) -> None:
    with client.stream("GET", f"/jobs/{job_id}/result") as response:
        if response.status_code != 200:
            response.read()
            _raise_for(response)
        if output is None:
            for piece in response.iter_bytes():
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            return
        draft = output.with_name(f".{output.name}.part")
        with draft.open("wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)
        draft.replace(output)


def _asked(client: "httpx.Client", method: str, path: str, **options: Any) -> dict[str, Any]:
    response = client.request(method, path, **options)
    if response.status_code >= 400:
        _raise_for(response)
    answer: dict[str, Any] = response.json() if response.content else {}
    return answer


def _raise_for(response: "httpx.Response") -> None:
    from overtone.cli.exits import error_of

    try:
        problem = response.json()
        code, detail = str(problem["code"]), str(problem["detail"])
        more = [f"{one['field']}: {one['problem']}" for one in problem.get("errors", [])[1:]]
    except (ValueError, KeyError, TypeError, AttributeError):
        code, detail, more = "unavailable", f"The API answers {response.status_code}.", []
    raise error_of(code)("\n".join([detail, *more]))


def _told(job: dict[str, Any], *, as_json: bool, was_awaited: bool = False) -> int:
    from overtone.cli.exits import exit_code
    from overtone.cli.report_table import report_table
    from overtone.errors import DataError

    console = Console()
    if as_json:
        console.print_json(json.dumps(job))
    else:
        console.print(f"{job['job_id']}: {_standing(job)}.", highlight=False, markup=False, soft_wrap=True)
        if job["error"]:
            console.print(job["error"], highlight=False, markup=False, soft_wrap=True)
        for one in job["problems"]:
            line = f"line {one['line']}, {one['field']}: {one['problem']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if job["kind"] == "report" and job["outcome"]:
            console.print(report_table(job["outcome"]))
    return exit_code(DataError()) if was_awaited and job["state"] != "succeeded" else 0


def _standing(job: dict[str, Any]) -> str:
    """The state of `job` and how far it is, in what it counts."""
    kind, state = job["kind"], job["state"]
    if kind not in {"score", "rescore"}:
        return f"{kind} {state}"
    if job["total"] is None:
        return f"{state}, posts not counted yet"
    things = "lines" if kind == "score" else "posts"
    said = f"{state}, {job['done']:,} of {job['total']:,} {things} done, {job['failed']:,} with an error"
    if kind == "rescore" and job["outcome"]:
        said += f"; {job['outcome']['written']:,} predictions by {job['outcome']['model_version']} written"
    return said


def _require_new(output: Path | None) -> None:
    from overtone.errors import ConfigurationError

    if output is not None and output.exists():
        raise ConfigurationError(f"{output}: is there already.")


def _errors() -> Console:
    return Console(stderr=True)
