"""`overtone k8s`: Overtone on a Kubernetes cluster, without `kubectl`. See docs/kubernetes.md."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from kuberay.api import KubeApi
    from kuberay.client import Patience, Seen, Stack
    from kuberay.states import State

app = typer.Typer(help="Overtone on a Kubernetes cluster.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Overlay = Annotated[str, typer.Argument(help="dev, production, gpu, multi-region, or a folder with a kustomization.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Have the server check it, and change nothing.")]
Timeout = Annotated[str, typer.Option(metavar="TIME", help="How long to wait at most, such as 90s or 15m.")]


class _Target:
    """Which cluster; options that stand before the command."""

    context: str | None = None
    kubeconfig: str | None = None
    namespace = "overtone"


@app.callback()
def _before(
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig [default: the current one].")] = None,
    kubeconfig: Annotated[Path | None, typer.Option(help="File of clusters and credentials.")] = None,
    namespace: Annotated[str, typer.Option(help="Namespace of the RayService.")] = "overtone",
) -> None:
    _Target.context, _Target.namespace = context, namespace
    _Target.kubeconfig = str(kubeconfig) if kubeconfig else None


@app.command()
def render(overlay: Overlay, as_json: AsJson = False) -> int:
    """Print the manifests of an overlay, after they were checked."""
    import yaml

    from kuberay.build import build_overlay
    from kuberay.rules import problems
    from overtone.errors import ManifestError

    documents = build_overlay(overlay)
    found = problems(documents)
    if found:
        raise ManifestError("\n".join(map(str, found)))
    typer.echo(json.dumps(documents) if as_json else yaml.safe_dump_all(documents, sort_keys=False), nl=as_json)
    return 0


@app.command()
def diff(overlay: Overlay, as_json: AsJson = False) -> int:
    """Show what deploying would change, as the server decides it; exit code 1 if anything would."""
    from difflib import unified_diff

    from kuberay.build import build_overlay

    with _stack() as stack:
        changes = stack.apply(build_overlay(overlay), dry_run=True)
    pending = [each for each in changes if each.action != "unchanged"]
    if as_json:
        _print([{"kind": each.kind, "name": each.name, "action": each.action} for each in pending])
    for change in () if as_json else pending:
        name = f"{change.kind}/{change.name}"
        before, after = (_lines(each) for each in (change.before, change.after))
        typer.echo("\n".join(unified_diff(before, after, f"{name} (now)", f"{name} ({change.action})", lineterm="")))
    return 1 if pending else 0


@app.command()
def deploy(overlay: Overlay, timeout: Timeout = "30m", dry_run: DryRun = False, as_json: AsJson = False) -> int:
    """Apply an overlay, migrate, and wait until it serves."""
    from kuberay.build import build_overlay

    documents = build_overlay(overlay)
    with _stack() as stack, _watching(as_json or dry_run) as seen:
        changes = stack.apply(documents, dry_run=True) if dry_run else stack.deploy(documents, _patience(timeout), seen)
    told = [{"kind": each.kind, "name": each.name, "action": each.action} for each in changes]
    return _done({"dry_run": dry_run, "changes": told}, f"{len(told)} objects: {_counts(told)}", as_json)


@app.command()
def status(as_json: AsJson = False) -> int:
    """Show what is deployed; exit code 1 if any of it is not ready."""
    with _stack() as stack:
        states = stack.states()
    if as_json:
        _print([asdict(each) for each in states])
    else:
        Console().print(_table(states))
    return 0 if all(each.ready for each in states) else 1


@app.command()
def wait(timeout: Timeout = "30m", as_json: AsJson = False) -> int:
    """Wait until the RayService serves."""
    with _stack() as stack, _watching(as_json) as seen:
        stack.wait([stack.service()], _patience(timeout), seen)
    return _done({"ready": True}, "It serves.", as_json)


@app.command()
def logs(
    group: Annotated[str, typer.Option(help="head, or the name of a worker group.")] = "serve-cpu",
    container: Annotated[str | None, typer.Option(help="Default: Ray's container.")] = None,
    tail: Annotated[int, typer.Option(min=1, max=100_000, help="Lines of each pod.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, with the first pod.")] = False,
) -> int:
    """Print the logs of a group's pods, each line after its pod."""
    chosen = container or ("ray-head" if group == "head" else "ray-worker")
    with _api() as api, _stack(api) as stack:
        for pod in stack.pods(group):
            for line in api.log_lines(pod, _Target.namespace, container=chosen, tail=tail, follow=follow):
                typer.echo(f"{pod} {line}")
    return 0


@app.command()
def scale(
    group: Annotated[str, typer.Argument(help="Name of a worker group.")],
    replicas: Annotated[int, typer.Argument(min=0, max=10_000, help="Pods it has at least.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Set the least number of pods of a worker group; the next deployment sets what its overlay says."""
    with _stack() as stack:
        stack.scale(group, replicas, dry_run=dry_run)
    return _done({"group": group, "replicas": replicas, "dry_run": dry_run}, f"{group}: {replicas} pods.", as_json)


@app.command("submit-train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit_train(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Name of the run, new each time.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Run `python -m train` on the cluster; its options follow after --."""
    with _stack() as stack:
        stack.train(name, shlex.join(["python", "-m", "train", *context.args]), dry_run=dry_run)
    return _done({"rayjob": name, "dry_run": dry_run}, f"Submitted RayJob {name}.", as_json)


@app.command()
def rollout(
    bundle: Annotated[
        str | None, typer.Option(help="Folder of the bundle, as replicas see it; default: the image's.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image to replace the cluster's with; `-cuda` is added where due.")
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Replace the cluster by one of the spec as deployed.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace it even if training runs, which ends.")] = False,
    timeout: Timeout = "15m",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Roll out a bundle in place, or an image on a second cluster; what fails is taken back (exit code 14)."""
    from overtone.errors import ConfigurationError
    from overtone.settings import load_settings

    if (bundle is not None) + (image is not None) + cluster != 1:
        raise ConfigurationError("Give one of --bundle, --image and --cluster.")
    secret = load_settings().overtone_api_key
    key = secret.get_secret_value() if secret else None
    with _stack() as stack, _watching(as_json) as seen:
        if bundle is None:
            stack.roll_cluster(image, _patience(timeout), seen, force=force, dry_run=dry_run)
            asked = False
        else:
            folder = None if bundle == "default" else bundle
            asked = stack.roll_bundle(folder, _patience(timeout), seen, api_key=key, dry_run=dry_run) and not dry_run
    told = {"rolled_out": bundle or image or "cluster", "replicas_asked": asked, "dry_run": dry_run}
    note = "" if asked or bundle is None else " Replicas were not asked: OVERTONE_API_KEY is not set."
    return _done(told, "Checked, nothing changed." if dry_run else f"Rolled out.{note}", as_json)


@app.command()
def follow(
    bundles: Annotated[
        Path, typer.Option(help="Folder for its bundle, on a volume that replicas see under the same path.")
    ] = Path("/models/bundles"),
    api: Annotated[
        str | None, typer.Option(metavar="URL", help="Where replicas are asked [default: through the Kubernetes API].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if it failed before or was rolled back.")] = False,
    keep: Annotated[int, typer.Option(min=0, help="How many earlier bundles stay in that folder.")] = 3,
    timeout: Timeout = "15m",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Roll out the registry's champion, once: not if it is served, failed before, or was rolled back.

    Exit code 0 whether it was rolled out or not: `outcome` of --json is rolled_out, served, held, waits or none.
    """
    from overtone.cli.follow import FollowOptions
    from overtone.cli.follow import follow as run
    from overtone.logging import configure
    from overtone.settings import load_settings

    settings = load_settings()
    configure("follow", settings.log_level, settings.log_format)
    options = FollowOptions(bundles.absolute(), _patience(timeout), keep, force=force, dry_run=dry_run)
    with _api() as kube:
        from kuberay.client import Stack

        stack = Stack(kube, namespace=_Target.namespace, replicas_url=api, key_header=settings.api_key_header)
        found = run(settings, stack, options, lambda: _watching(as_json or dry_run))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return 0
    what = f"{found.champion} (version {found.registry}): " if found.champion else ""
    word = "would be rolled out" if found.dry_run and found.outcome == "rolled_out" else found.outcome.replace("_", " ")
    Console().print(f"{escape(what)}{word}: {escape(found.reason)}.", highlight=False, soft_wrap=True)
    return 0


@app.command()
def rollback(timeout: Timeout = "15m", as_json: AsJson = False) -> int:
    """Return to what the last rollout replaced."""
    with _stack() as stack, _watching(as_json) as seen:
        stack.roll_back(_patience(timeout), seen)
    return _done({"rolled_back": True}, "Rolled back.", as_json)


@app.command()
def suspend(
    resume: Annotated[bool, typer.Option("--resume", help="Take the nodes back.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Let go of all nodes of the Ray cluster; nothing is served until --resume."""
    with _stack() as stack:
        stack.suspend(not resume, dry_run=dry_run)
    return _done({"suspended": not resume, "dry_run": dry_run}, "Resumed." if resume else "Suspended.", as_json)


@app.command()
def delete(
    overlay: Overlay,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Delete what deploying made, less data, the namespace and priority classes."""
    from kuberay.build import build_overlay

    documents = build_overlay(overlay)
    if not yes and not dry_run:
        typer.confirm(f"Delete Overtone from namespace {_Target.namespace}?", abort=True, err=True)
    with _stack() as stack:
        gone = stack.delete(documents, dry_run=dry_run)
    return _done({"deleted": gone, "dry_run": dry_run}, f"Deleted {len(gone)} objects.", as_json)


@contextmanager
def _api() -> Iterator["KubeApi"]:
    from kuberay.api import KubeApi

    api = KubeApi(_Target.context, _Target.kubeconfig)
    try:
        yield api
    finally:
        api.close()


@contextmanager
def _stack(api: "KubeApi | None" = None) -> Iterator["Stack"]:
    from kuberay.client import Stack

    if api is not None:
        yield Stack(api, namespace=_Target.namespace)
        return
    with _api() as own:
        yield Stack(own, namespace=_Target.namespace)


def _patience(timeout: str) -> "Patience":
    from kuberay.client import Patience
    from overtone.cli.durations import parse_duration

    return Patience(timeout_s=parse_duration(timeout))


@contextmanager
def _watching(is_quiet: bool) -> Iterator["Seen"]:
    """A live table of what is waited for, on standard error."""
    if is_quiet:
        yield lambda _: None
        return
    rows: dict[tuple[str, str], State] = {}
    with Live(console=Console(stderr=True), refresh_per_second=4) as live:

        def seen(state: "State") -> None:
            rows[state.kind, state.name] = state
            live.update(_table(list(rows.values())))

        yield seen


def _table(states: "list[State]") -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("kind", "name", "state", "detail"):
        table.add_column(column, overflow="fold")
    for each in states:
        word = "[red]failed[/]" if each.failed else "[green]ready[/]" if each.ready else "[yellow]waiting[/]"
        table.add_row(each.kind, escape(each.name), word, escape(each.message))
    return table


def _lines(document: dict[str, Any] | None) -> list[str]:
    """What people compare, as lines of YAML: no status, none of the server's own fields; nothing for None."""
    import yaml

    if document is None:
        return []
    metadata = {key: document["metadata"].get(key) for key in ("name", "namespace", "labels", "annotations")}
    shown = {key: value for key, value in document.items() if key not in {"metadata", "status"}}
    shown["metadata"] = {key: value for key, value in metadata.items() if value}
    return yaml.safe_dump(shown, sort_keys=True).splitlines()


def _counts(changes: list[dict[str, str]]) -> str:
    actions = [each["action"] for each in changes]
    return ", ".join(f"{actions.count(word)} {word}" for word in ("created", "changed", "unchanged") if word in actions)


def _done(told: Any, sentence: str, as_json: bool) -> int:
    if as_json:
        _print(told)
    else:
        Console().print(sentence, highlight=False, soft_wrap=True)
    return 0


def _print(told: Any) -> None:
    typer.echo(json.dumps(told, indent=1))
