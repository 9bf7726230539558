"""The commands and their options. What a command needs is imported when it is run, so that help is quick."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from overtone import __version__
from overtone.cli.backup import app as backups
from overtone.cli.ingest import app as ingestion
from overtone.cli.jobs import app as jobs
from overtone.cli.k8s import app as k8s
from overtone.cli.labels import app as labels
from overtone.cli.letters import app as letters
from overtone.cli.rescore import rescore
from overtone.cli.retrain import retrain
from overtone.cli.rules import app as rules

if TYPE_CHECKING:
    from overtone.cli.up import UpOptions
    from overtone.erasure import Kind

app = typer.Typer(
    name="overtone",
    help="A sentiment pipeline for X posts: stream, store, classify, correct, retrain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
database = typer.Typer(help="The tables of the database.", no_args_is_help=True)
app.add_typer(database, name="db")
keys = typer.Typer(help="API keys: who may call, and how much.", no_args_is_help=True)
app.add_typer(keys, name="keys")
audit = typer.Typer(help="What administrators did.", no_args_is_help=True)
app.add_typer(audit, name="audit")

erasure = typer.Typer(help="Erase posts and authors for good, with a receipt.", no_args_is_help=True)
app.add_typer(erasure, name="erase")
exports = typer.Typer(help="What is stored about one author.", no_args_is_help=True)
app.add_typer(exports, name="export")
compliance = typer.Typer(help="What X wants removed.", no_args_is_help=True)
app.add_typer(compliance, name="compliance")
models = typer.Typer(help="The bundles that are served, and a challenger on trial.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(k8s, name="k8s")
app.add_typer(backups, name="backup")
app.add_typer(letters, name="dead-letters")
app.add_typer(labels, name="labels")
app.add_typer(jobs, name="jobs")
app.add_typer(ingestion, name="ingest")
app.command()(rescore)
app.command()(retrain)
app.add_typer(rules, name="rules")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class _Globals:
    """Options that stand before the command."""

    is_debugging = False


def run() -> NoReturn:
    """Run the command line and exit: 0, or the code of `overtone.cli.exits`."""
    try:
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except BaseException as error:  # the edge: every failure becomes a sentence and an exit code
        code = _fail(error)
    sys.exit(code)


def _fail(error: BaseException) -> int:
    from overtone.cli.exits import INTERRUPTED, tell
    from overtone.logging import configure

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    configure("cli", "ERROR", "console")
    return tell(error, Console(stderr=True), with_trace=_Globals.is_debugging)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        Console().print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _before(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    _Globals.is_debugging = debug


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when all is up and leave it running.")] = False,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TIME", help="Stop after this long, such as 90s or 10m, counted from when all is up."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=10_000, help="Posts a second of the simulator [default: SIMULATOR_RATE]."),
    ] = None,
    ingest: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="YAML options of the ingestion, its rules among them; may be repeated, a later file wins.",
        ),
    ] = None,
    dashboard: Annotated[
        bool | None,
        typer.Option(
            help="Run Ray's dashboard, which is ten more processes [default: on machines with 4 cores or more]."
        ),
    ] = None,
    link: Annotated[bool, typer.Option(hidden=True)] = True,
    as_json: AsJson = False,
) -> int:
    """Start everything: database, Ray, the API, the source of posts, the ingestion. Ctrl-C stops all of it."""
    from overtone.cli.durations import parse_duration
    from overtone.cli.up import UpOptions, up_detached
    from overtone.cli.up import up as run_up

    options = UpOptions(
        seconds=parse_duration(for_) if for_ else None,
        rate=rate,
        as_json=as_json,
        has_dashboard=dashboard,
        ingest_files=tuple(ingest or ()),
        shows_link=link,
    )
    if detach:
        return up_detached(_settings(), _arguments(options, for_), Console(), as_json=as_json)
    return run_up(_settings(), options, Console())


def _arguments(options: "UpOptions", for_: str | None) -> list[str]:
    arguments = ["--for", for_] if for_ else []
    arguments += ["--rate", str(options.rate)] if options.rate else []
    arguments += [part for path in options.ingest_files for part in ("--ingest", str(path))]
    if options.has_dashboard is not None:
        arguments += ["--dashboard" if options.has_dashboard else "--no-dashboard"]
    return arguments


@app.command()
def down() -> int:
    """Stop everything that runs in OVERTONE_HOME, whatever became of the `up` that started it."""
    from overtone.cli.down import down as run_down

    return run_down(_settings(), Console())


@app.command()
def status(
    as_json: AsJson = False,
    link: Annotated[bool, typer.Option("--link", help="Print a new link that signs one browser in.")] = False,
) -> int:
    """Show what runs, where, and how fast."""
    from overtone.cli.status import status as run_status

    return run_status(_settings(), Console(), as_json=as_json, with_link=link)


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to classify.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", help="Classify the rows of a .csv, .tsv, .jsonl or .txt file; - for standard input."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write JSON lines; a file begun before is continued.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column or field that holds the text.")] = "text",
    local: Annotated[bool, typer.Option("--local", help="Classify in this process even if the API is up.")] = False,
    as_json: AsJson = False,
) -> int:
    """Classify texts with the running API, or in this process if it is not up."""
    from overtone.cli.predict import FileJob, predict_file, predict_texts
    from overtone.errors import ConfigurationError

    if bool(texts) == (file is not None):
        raise ConfigurationError("Give either texts or --file.")
    if file is None:
        return predict_texts(_settings(), texts or [], Console(), is_local=local, as_json=as_json)
    return predict_file(_settings(), FileJob(file, output, text_column), is_local=local)


@app.command()
def doctor(
    as_json: AsJson = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Run the engine for a second and show texts a second.")
    ] = False,
) -> int:
    """Check this machine and these settings; say how to mend what is wrong."""
    from overtone.cli.doctor import doctor as run_doctor

    return run_doctor(Console(), as_json=as_json, bench=bench)


@app.command()
def simulate(
    scenario: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="YAML scenario: options, and faults with their moments.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port on loopback.")] = 8300,
    rate: Annotated[float | None, typer.Option(help="Posts a second [default: the scenario's, or 50].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Publish this many posts, then only keep-alives.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the posts and the faults [default: the scenario's, or 0].")
    ] = None,
    posts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to send, .jsonl, .tsv or .csv, over and over.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what the scenario will do, and when.")] = False,
) -> int:
    """Speak the X API on this machine, with faults on purpose: try a configuration without paying for posts."""
    from overtone.cli.simulate import SimulateOptions
    from overtone.cli.simulate import simulate as run_simulate

    wanted = SimulateOptions(port, scenario, rate, limit, seed, posts)
    return run_simulate(_settings(), wanted, Console(), only_checks=check)


@app.command()
def cost(
    predictions_per_day: Annotated[float, typer.Option(min=1, max=1e12, help="Texts a day, posts included.")],
    posts_per_day: Annotated[
        float | None, typer.Option(min=0, max=1e10, help="Of these, posts stored from X [default: the file's].")
    ] = None,
    prices: Annotated[Path, typer.Option(help="Prices, and what was measured.")] = Path("configs/cost.yaml"),
    results: Annotated[
        Path | None, typer.Option(help="Throughput of a benchmark, such as benchmarks/results/latest.json.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Estimate what a load costs a month, and what that hangs on."""
    from overtone.cli.cost import load_prices, show_cost, with_results

    table = load_prices(prices)
    if results is not None:
        table = with_results(table, results)
    if posts_per_day is not None:
        table = table.model_copy(update={"load": table.load.model_copy(update={"posts_per_day": posts_per_day})})
    return show_cost(table, predictions_per_day, Console(), as_json=as_json)


@database.command("upgrade")
def database_upgrade() -> int:
    """Bring the tables to the version this program needs."""
    from overtone.cli.database import upgrade_database

    return upgrade_database(_settings(), Console())


@database.command("check")
def database_check() -> int:
    """Say whether the tables are as this program needs them."""
    from overtone.cli.database import check_database

    return check_database(_settings(), Console())


@database.command("retention")
def database_retention(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be dropped.")] = False,
    as_json: AsJson = False,
) -> int:
    """Make the partitions of the next weeks, and archive and drop the months over the limits of the settings."""
    from overtone.cli.retention import run_retention

    return run_retention(_settings(), Console(), is_dry_run=dry_run, as_json=as_json)


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="What or who the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="predict, read, feedback or admin; may be repeated [default: predict and read]."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="When it ends, counted from now, such as 90d [default: never].")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=0, max=10_000_000, help="0: no limit [default: LIMIT_REQUESTS_PER_MINUTE].")
    ] = None,
    texts_per_minute: Annotated[
        int | None, typer.Option(min=0, max=1_000_000_000, help="0: no limit [default: LIMIT_TEXTS_PER_MINUTE].")
    ] = None,
    texts_per_day: Annotated[
        int | None, typer.Option(min=0, max=1_000_000_000_000, help="0: no limit [default: LIMIT_TEXTS_PER_DAY].")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Make a key and print its secret, which cannot be shown again."""
    from overtone.cli.durations import parse_duration
    from overtone.cli.keys import NewKey, create
    from overtone.db.keys import KeyLimits

    ends_s = parse_duration(expires, longest_days=3650) if expires else None
    limits = KeyLimits(requests_per_minute, texts_per_minute, texts_per_day)
    wanted = NewKey(name, tuple(scope or ("predict", "read")), ends_s, limits)
    return create(_settings(), wanted, Console(), as_json=as_json)


@keys.command("import")
def keys_import(
    name: Annotated[str, typer.Option(help="What or who the key is for.")] = "imported",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="predict, read, feedback or admin; may be repeated [default: predict and read]."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Make the secret in OVERTONE_API_KEY a valid key, for deployments that choose it beforehand."""
    from overtone.cli.keys import import_key

    return import_key(_settings(), name, tuple(scope or ("predict", "read")), Console(), as_json=as_json)


@keys.command("list")
def keys_list(
    with_ended: Annotated[bool, typer.Option("--all", help="Show revoked and expired keys too.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show the keys, their scopes and their limits."""
    from overtone.cli.keys import list_keys

    return list_keys(_settings(), Console(), with_ended=with_ended, as_json=as_json)


@keys.command("rotate")
def keys_rotate(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id or name of the key.")],
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="How long the old secret and its sessions stay good; 0 for not at all.")
    ] = "1h",
    as_json: AsJson = False,
) -> int:
    """Give a key a new secret; its id and limits stay."""
    from overtone.cli.durations import parse_duration
    from overtone.cli.keys import rotate

    grace_s = 0.0 if grace.strip() == "0" else parse_duration(grace)
    return rotate(_settings(), key, Console(), grace_s=grace_s, as_json=as_json)


@keys.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id or name of the key.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> int:
    """End a key and its sessions for good."""
    from overtone.cli.keys import revoke

    return revoke(_settings(), key, Console(), is_sure=yes, as_json=as_json)


@audit.command("list")
def audit_list(
    newest: Annotated[int, typer.Option(min=1, max=10_000, help="How many entries.")] = 50,
    action: Annotated[
        str | None, typer.Option(help="Only this action, such as key.created, or this area, such as key.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show keys, sessions and models that were changed, newest first."""
    from overtone.cli.keys import show_audit

    if action and "." not in action:
        action += "."
    return show_audit(_settings(), Console(), newest=newest, action=action, as_json=as_json)


PostId = Annotated[int, typer.Argument(metavar="ID", help="Id of the post.")]
AuthorId = Annotated[int, typer.Argument(metavar="ID", help="Id of the author.")]
Preview = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
ReceiptFile = Annotated[Path | None, typer.Option("--receipt", metavar="FILE", help="Write the receipt there.")]
Sure = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@erasure.command("post")
def erase_post(
    post: PostId, dry_run: Preview = False, receipt: ReceiptFile = None, yes: Sure = False, as_json: AsJson = False
) -> int:
    """Erase a post and its edits from every table and file, and keep it away."""
    return _erase("post", post, dry_run=dry_run, receipt=receipt, is_sure=yes, as_json=as_json)


@erasure.command("author")
def erase_author(
    author: AuthorId, dry_run: Preview = False, receipt: ReceiptFile = None, yes: Sure = False, as_json: AsJson = False
) -> int:
    """Erase all posts of an author from every table and file, and store none of theirs again."""
    return _erase("author", author, dry_run=dry_run, receipt=receipt, is_sure=yes, as_json=as_json)


def _erase(kind: "Kind", number: int, *, dry_run: bool, receipt: Path | None, is_sure: bool, as_json: bool) -> int:
    from overtone.cli import erase

    if dry_run:
        return erase.preview(_settings(), kind, number, Console(), as_json=as_json)
    erase.confirm(kind, is_sure)
    return erase.erase(_settings(), kind, number, Console(), receipt_file=receipt, as_json=as_json)


@erasure.command("verify")
def erase_verify(
    receipt: Annotated[Path, typer.Argument(metavar="RECEIPT", help="File with the receipt.")],
    public_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Trust this public key, in base64 [default: this installation's].")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say whether a receipt is whole and signed by this installation."""
    from overtone.cli.erase import check_receipt

    return check_receipt(_settings(), receipt, Console(), trusted=public_key, as_json=as_json)


@compliance.command("sweep")
def compliance_sweep(
    ingest: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="YAML options of the ingestion; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Ask X about all stored posts in batch compliance jobs, and remove what must go."""
    from overtone.cli.compliance import sweep_once

    return sweep_once(_settings(), tuple(ingest or ()), Console(), as_json=as_json)


@exports.command("author")
def export_author(
    author: AuthorId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A new file [default: standard output].")
    ] = None,
) -> int:
    """Write all posts of an author with their predictions and corrections, one JSON object a line."""
    from overtone.cli.erase import export_author as run_export

    return run_export(_settings(), author, output, Console())


DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the bundles and say what would be done.")]
Name = Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder, or challenger, previous or default.")]
Share = Annotated[float, typer.Argument(min=0.0, max=1.0, help="Share of requests, 0 to 1; 0 ends it.")]
Challenger = Annotated[
    str | None, typer.Option("--bundle", metavar="FOLDER", help="The challenger [default: the one on trial].")
]


@models.command("list")
def models_list(as_json: AsJson = False) -> int:
    """Show what each replica serves; exit code 8 if a bundle was refused or a canary taken back."""
    from overtone.cli.models import list_models

    return list_models(_settings(), Console(), as_json=as_json)


@models.command("promote")
def models_promote(bundle: Name = "challenger", dry_run: DryRun = False, as_json: AsJson = False) -> int:
    """Make a bundle the champion, after its golden texts were checked."""
    from overtone.cli.models import order

    change = lambda rollout: rollout.promoted(rollout.folder_of(bundle))  # noqa: E731
    return order(_settings(), change, Console(), is_dry_run=dry_run, as_json=as_json)


@models.command("rollback")
def models_rollback(dry_run: DryRun = False, as_json: AsJson = False) -> int:
    """Return to the champion before, and end what is on trial."""
    from overtone.cli.models import order

    return order(_settings(), lambda rollout: rollout.rolled_back(), Console(), is_dry_run=dry_run, as_json=as_json)


@models.command("pull")
def models_pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="champion, challenger, previous, a number or a bundle's version.")
    ] = "champion",
    as_json: AsJson = False,
) -> int:
    """Fetch a bundle from the MLflow registry into OVERTONE_HOME/bundles and print its folder."""
    from overtone.cli.models import pull

    return pull(_settings(), name, Console(), as_json=as_json)


@models.command("prune")
def models_prune(
    keep: Annotated[int, typer.Option(min=0, help="How many of those that nothing refers to stay.")] = 3,
    dry_run: Preview = False,
    as_json: AsJson = False,
) -> int:
    """Remove bundles in OVERTONE_HOME/bundles that are not served and have no alias; the registry keeps them."""
    from overtone.cli.models import prune

    return prune(_settings(), Console(), keep=keep, is_dry_run=dry_run, as_json=as_json)


@models.command("shadow")
def models_shadow(share: Share, bundle: Challenger = None, dry_run: DryRun = False, as_json: AsJson = False) -> int:
    """Have a challenger classify a share of requests too, unseen, and count where it disagrees."""
    from overtone.cli.models import order

    change = lambda rollout: rollout.trying(bundle and rollout.folder_of(bundle), shadow=share)  # noqa: E731
    return order(_settings(), change, Console(), is_dry_run=dry_run, as_json=as_json)


@models.command("canary")
def models_canary(share: Share, bundle: Challenger = None, dry_run: DryRun = False, as_json: AsJson = False) -> int:
    """Have a challenger answer a share of requests; it is taken back by itself when it fails or is slow."""
    from overtone.cli.models import order

    change = lambda rollout: rollout.trying(bundle and rollout.folder_of(bundle), canary=share)  # noqa: E731
    return order(_settings(), change, Console(), is_dry_run=dry_run, as_json=as_json)


def _settings() -> Any:
    from overtone.logging import configure
    from overtone.settings import load_settings

    settings = load_settings()
    if settings.log_level == "DEBUG":
        _Globals.is_debugging = True
    configure("cli", "ERROR", "console")
    return settings
