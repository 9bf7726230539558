"""The registry's champion served on Kubernetes: real MLflow, and bundles that a replica's own checks look at.

The Kubernetes API, KubeRay's operator and the replicas are stand-ins that speak HTTP.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from pydantic import SecretStr

from kube_server import (
    SERVICE,
    KubeServer,
    Operator,
    Status,
    operating,
    service_of,
    serving,
    status_of,
    user_config,
    write_kubeconfig,
)
from kuberay.api import KubeApi
from kuberay.build import Document, build_overlay
from kuberay.champion import NOTE, WITHDRAWN, Note, note_of
from kuberay.client import Patience, Stack
from kuberay.spec import annotation
from kuberay.states import State, state_of
from overtone.bundle import Bundle, BundleSpec, Golden, TextEncoder, load_bundle, write_bundle
from overtone.cli.follow import Followed, FollowOptions, follow
from overtone.engine import check_golden, classify_sorted, open_engine
from overtone.errors import (
    BundleError,
    ClusterError,
    ClusterTimeoutError,
    ConfigurationError,
    RolloutError,
    UnauthorizedError,
    UnavailableError,
)
from overtone.registry import BUNDLE_FOLDER, BUNDLE_TAG, Registry, tracking_uri
from overtone.settings import Settings, environment_for, load_settings
from train.config import TrainConfig
from train.tracking import tracked_run

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # what MLflow and the libraries under it say of each other
    pytest.mark.usefixtures("mlflow_as_before"),
]

ROOT = Path(__file__).parents[2]
PATIENCE = Patience(timeout_s=20.0, settle_s=0.3)
KEY = "a-key-of-twenty-characters"
SERVE = [each for each in build_overlay("dev") if each["kind"] == "RayService"]


def variant(folder: Path, temperature: float, *, labels: tuple[str, ...] = (), honest: bool = True) -> Bundle:
    """The default bundle with another temperature; not `honest`: its golden scores are not those that it gives."""
    original = load_bundle()
    shutil.copytree(original.path, folder)
    chosen = labels or original.labels
    spec = BundleSpec("moods", chosen, original.max_length, temperature, original.precision, original.golden)
    draft = write_bundle(folder, spec=spec)
    engine = open_engine(draft)
    scores = classify_sorted(engine, TextEncoder(draft).encode([one.text for one in draft.golden]))
    engine.close()
    told = scores if honest else scores[:, ::-1]
    golden = tuple(Golden(one.text, tuple(map(float, row))) for one, row in zip(draft.golden, told, strict=True))
    return write_bundle(folder, spec=replace(spec, golden=golden))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    return load_settings(
        overtone_home=home, mlflow_tracking_uri=None, wandb_api_key=None, overtone_api_key=KEY, bundle=None
    )


@pytest.fixture(scope="module")
def versions(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bundle versions by what they are; all are in the registry."""
    folder = tmp_path_factory.mktemp("made")
    made = {
        "first": variant(folder / "first", 1.2),
        "second": variant(folder / "second", 1.3),
        "unfit": variant(folder / "unfit", 1.4, honest=False),
        "foreign": variant(folder / "foreign", 1.5, labels=("bad", "so-so", "good")),
    }
    first = made.pop("first")
    with tracked_run(settings, TrainConfig(name="moods"), "first") as tracker:
        assert tracker.bundle(first.path, as_challenger=True)
    client = mlflow.MlflowClient(tracking_uri(settings), tracking_uri(settings))
    for name, bundle in made.items():
        # As it lies in the store, without the half minute that MLflow takes to look at what it logs.
        source = folder / f"{name}-model"
        shutil.copytree(bundle.path, source / "artifacts" / BUNDLE_FOLDER)
        tags = {BUNDLE_TAG: bundle.version}
        client.create_model_version(settings.mlflow_model_name, source.as_uri(), tags=tags)
    made["first"] = first
    return {name: bundle.version for name, bundle in made.items()}


class Replica:
    """Carries out what the RayService orders when it is asked, as a replica does, and refuses what it would refuse."""

    def __init__(self, server: KubeServer) -> None:
        self.server = server
        self.bundle = load_bundle()
        self.revision = 0
        self.refused: list[dict[str, str]] = []
        self.is_deaf = False

    def answer(self, key: str) -> Status:
        if key != KEY:
            return status_of(401, "no such key")
        ordered = {"bundle": None, "revision": 0} | user_config(self.server)
        if ordered["revision"] != self.revision and not self.is_deaf:
            try:
                bundle = load_bundle(Path(ordered["bundle"]) if ordered["bundle"] else None)
                engine = open_engine(bundle)
                check_golden(bundle, engine)
                engine.close()
                self.bundle = bundle
            except BundleError as error:
                self.refused.append({"reason": error.message})
            self.revision = ordered["revision"]
        champion = {
            "version": self.bundle.version,
            "folder": str(self.bundle.path),
            "labels": list(self.bundle.labels),
        }
        return 200, {"revision": self.revision, "champion": champion, "refused": self.refused}


@dataclass
class World:
    """A cluster that serves the default bundle, and a registry whose champion is to be followed."""

    settings: Settings
    versions: dict[str, str]
    server: KubeServer
    operator: Operator
    replica: Replica
    api: KubeApi
    stack: Stack
    bundles: Path

    @property
    def served(self) -> str | None:
        """The version that the replica serves by what is ordered now."""
        self.replica.answer(KEY)
        return self.replica.bundle.version

    @property
    def note(self) -> Note:
        found = note_of(service_of(self.server))
        assert found is not None
        return found

    def promote(self, name: str) -> str:
        """Make a version the champion; the folder that it is to be served from."""
        registry = Registry(self.settings)
        registry.set_alias("champion", registry.resolve(self.versions[name]))
        return str(self.bundles / self.versions[name])

    def follow(self, *, settings: Settings | None = None, **options: Any) -> Followed:
        chosen = FollowOptions(self.bundles, **({"patience": PATIENCE, "keep": 3} | options))
        return follow(settings or self.settings, self.stack, chosen, lambda: nullcontext(quiet))

    def patches(self) -> int:
        return sum(each.startswith("PATCH") for each in self.server.requests)


def quiet(_: State) -> None:
    pass


@pytest.fixture
def world(settings: Settings, versions: dict[str, str], tmp_path: Path) -> Iterator[World]:
    registry = Registry(settings)
    registry.follow("nothing-00000000", None)  # takes the alias away
    with serving() as server, operating(server) as operator:
        api = KubeApi(kubeconfig=str(write_kubeconfig(server, tmp_path / "kubeconfig")), pause_s=0.01)
        stack = Stack(api, replicas_url=server.address)
        stack.deploy(SERVE, PATIENCE, quiet)
        replica = Replica(server)
        server.replica = replica.answer
        yield World(settings, versions, server, operator, replica, api, stack, tmp_path / "volume")
        api.close()


def test_a_promoted_bundle_is_served_by_itself(world: World) -> None:
    assert world.follow().outcome == "none"
    folder = world.promote("first")
    before = world.patches()
    tried = world.follow(dry_run=True)
    assert (tried.outcome, tried.champion, tried.folder) == ("rolled_out", world.versions["first"], folder)
    assert tried.dry_run
    assert world.patches() == before + 1, "the server was asked whether it would take it"
    assert NOTE not in service_of(world.server)["metadata"].get("annotations", {})
    assert not Path(folder).exists()

    done = world.follow()
    assert (done.outcome, done.champion) == ("rolled_out", world.versions["first"])
    assert user_config(world.server)["bundle"] == folder
    assert load_bundle(Path(folder)).version == world.served == world.versions["first"]
    assert (world.note.state, world.note.version, world.note.previous) == ("served", world.versions["first"], None)

    before = world.patches()
    assert world.follow().outcome == "served"
    assert world.patches() == before
    world.promote("second")
    assert world.follow().outcome == "rolled_out"
    assert world.served == world.versions["second"]
    assert world.note.previous == folder


def test_a_rollout_removes_fetched_bundles_that_nothing_names(world: World) -> None:
    def kept() -> set[str]:
        return {path.name for path in world.bundles.iterdir()}

    first, second = (world.versions[name] for name in ("first", "second"))
    stray = Registry(world.settings, bundles=world.bundles)
    stray.fetch(stray.resolve(world.versions["unfit"]))
    world.promote("first")
    assert world.follow(keep=1).outcome == "rolled_out"
    assert kept() == {first, world.versions["unfit"]}
    world.promote("second")
    assert world.follow(keep=0).outcome == "rolled_out"
    assert kept() == {first, second}, "what was served before may be returned to"
    world.stack.roll_back(PATIENCE, quiet)
    assert world.served == first


def test_a_bundle_that_replicas_refuse_is_tried_once(world: World) -> None:
    world.promote("first")
    world.follow()
    world.promote("unfit")
    with pytest.raises(RolloutError, match=r"refused the bundle.*served again"):
        world.follow()
    assert world.served == world.versions["first"]
    assert (world.note.state, world.note.version) == ("refused", world.versions["unfit"])

    before = world.patches()
    for _ in range(2):
        held = world.follow()
        assert held.outcome == "held"
        assert "failed: A replica refused" in held.reason
    assert world.patches() == before
    with pytest.raises(RolloutError):
        world.follow(force=True)
    assert world.served == world.versions["first"]
    world.promote("second")
    assert world.follow().outcome == "rolled_out"
    assert world.served == world.versions["second"]


def test_what_an_operator_rolled_back_is_not_ordered_again(world: World) -> None:
    world.promote("first")
    world.follow()
    world.promote("second")
    world.follow()
    world.stack.roll_back(PATIENCE, quiet)
    assert world.served == world.versions["first"]
    before = world.patches()
    for _ in range(2):
        held = world.follow()
        assert (held.outcome, held.champion) == ("held", world.versions["second"])
        assert "rolled back" in held.reason
    assert world.patches() == before
    assert world.served == world.versions["first"]

    assert world.follow(force=True).outcome == "rolled_out"
    assert world.served == world.versions["second"]
    assert annotation(service_of(world.server), WITHDRAWN) is None
    world.stack.roll_back(PATIENCE, quiet)
    world.stack.roll_back(PATIENCE, quiet)
    assert world.follow().outcome == "served", "taking the rollback back ends it"


def test_a_rollback_by_hand_counts_wherever_the_bundle_lay(world: World, versions: dict[str, str]) -> None:
    """The run's own folder, rolled out and back by an operator before any champion was followed."""
    world.promote("first")
    run = world.bundles / "retrain-1"
    shutil.copytree(Registry(world.settings).fetch(Registry(world.settings).resolve(versions["first"])).path, run)
    world.stack.roll_bundle(str(run), PATIENCE, quiet, api_key=KEY)
    assert world.follow().outcome == "served", "the same bundle, from another folder"
    world.stack.roll_back(PATIENCE, quiet)
    assert world.follow().outcome == "held"
    # Another rollback forgets the first, and the note does not.
    world.stack.roll_bundle(str(shutil.copytree(load_bundle().path, world.bundles / "o")), PATIENCE, quiet, api_key=KEY)
    world.stack.roll_back(PATIENCE, quiet)
    assert world.follow().outcome == "held"


def test_what_an_operator_ordered_since_is_left_alone(world: World) -> None:
    world.promote("first")
    world.follow()
    world.stack.roll_bundle(None, PATIENCE, quiet, api_key=KEY)
    held = world.follow()
    assert held.outcome == "held"
    assert "something else since" in held.reason
    world.promote("second")
    assert world.follow().outcome == "rolled_out"


class CutOff(Stack):
    """Dies after the order, when it asks whether it was carried out."""

    asked = 0

    def ask_replica(self, api_key: str) -> Document:
        self.asked += 1
        if self.asked > 1:
            raise KeyboardInterrupt
        return super().ask_replica(api_key)


@pytest.mark.parametrize("name", ["first", "unfit"])
def test_a_rollout_that_was_cut_off_is_finished_by_the_next(world: World, name: str) -> None:
    folder = world.promote(name)
    whole, world.stack = world.stack, CutOff(world.api, replicas_url=world.server.address)
    with pytest.raises(KeyboardInterrupt):
        world.follow()
    assert (user_config(world.server)["bundle"], world.note.state) == (folder, "started")
    world.stack = whole
    if name == "first":
        assert world.follow().outcome == "rolled_out"
        assert (world.note.state, world.served) == ("served", world.versions["first"])
    else:
        with pytest.raises(RolloutError, match="served again"):
            world.follow()
        assert (world.note.state, user_config(world.server)["bundle"]) == ("refused", None)
        assert world.follow().outcome == "held"


def test_nothing_is_ordered_while_the_stack_is_not_itself(world: World) -> None:
    world.promote("first")
    world.stack.suspend(True)
    found = world.follow()
    assert (found.outcome, found.reason) == ("waits", "the stack is suspended")
    world.stack.suspend(False)
    change(world, upgradeStrategy={"type": "NewCluster"})
    assert world.follow().reason == "an image is being rolled out"
    change(world, upgradeStrategy={"type": "None"})
    world.operator.bad_bundles.add(None)
    deadline = time.monotonic() + 20.0
    while not state_of(service_of(world.server)).failed:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = world.follow()
    assert found.outcome == "waits"
    assert "not ready: Serve: no such bundle" in found.reason
    assert world.follow(force=True).outcome == "rolled_out"


def change(world: World, **spec: Any) -> None:
    """Change the RayService in one go, whatever the operator writes meanwhile."""
    with world.server.changed:
        service = service_of(world.server)
        world.server.write(SERVICE, service | {"spec": service["spec"] | spec})


def test_a_bundle_with_other_labels_is_not_ordered(world: World) -> None:
    world.promote("foreign")
    with pytest.raises(RolloutError, match="its labels are bad, so-so, good and those that are served"):
        world.follow()
    assert user_config(world.server).get("revision", 0) == 0
    assert world.follow().outcome == "held"
    assert user_config(world.server).get("revision", 0) == 0


def test_a_change_in_between_is_not_written_over(world: World) -> None:
    world.promote("first")

    def interfere(method: str, path: str) -> Status | None:
        if method != "PATCH":
            return None
        config = yaml.safe_load(service_of(world.server)["spec"]["serveConfigV2"])
        config["applications"][0]["deployments"][0]["user_config"] |= {"bundle": "/models/other", "revision": 1}
        change(world, serveConfigV2=yaml.safe_dump(config))
        return status_of(409, "the object has been modified", "overtone")

    world.server.faults.append(interfere)
    with pytest.raises(ClusterError, match="changed meanwhile"):
        world.follow()
    assert user_config(world.server)["bundle"] == "/models/other"


def test_replicas_that_never_say_so_end_it(world: World) -> None:
    world.promote("first")
    world.replica.is_deaf = True
    with pytest.raises(ClusterTimeoutError, match=r"Not every replica serves revision 1.*served again"):
        world.follow(patience=Patience(5.0, 0.3))
    assert (user_config(world.server)["bundle"], world.note.state) == (None, "refused")
    assert world.follow().outcome == "held"


def test_what_is_ordered_while_it_waits_stays(world: World) -> None:
    world.promote("first")
    answer, asked = world.replica.answer, 0
    world.replica.is_deaf = True

    def order_another(key: str) -> Status:
        nonlocal asked
        asked += 1
        if asked == 2:
            config = yaml.safe_load(service_of(world.server)["spec"]["serveConfigV2"])
            config["applications"][0]["deployments"][0]["user_config"] |= {"bundle": "/models/mine", "revision": 2}
            change(world, serveConfigV2=yaml.safe_dump(config))
        return answer(key)

    world.server.replica = order_another
    with pytest.raises(ClusterTimeoutError, match="Something else was ordered meanwhile, and stays"):
        world.follow(patience=Patience(5.0, 0.3))
    assert user_config(world.server)["bundle"] == "/models/mine"
    assert world.follow().outcome == "held"


def test_what_is_missing_is_named_before_anything_changes(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.promote("first")
    before = world.patches()
    given = world.settings.model_copy
    with pytest.raises(ConfigurationError, match="Set OVERTONE_API_KEY"):
        world.follow(settings=given(update={"overtone_api_key": None}))
    with pytest.raises(UnauthorizedError, match="does not take OVERTONE_API_KEY"):
        world.follow(settings=given(update={"overtone_api_key": SecretStr("another-key-of-20-chars")}))
    with pytest.raises(ConfigurationError, match="no registry to follow"):
        world.follow(settings=given(update={"overtone_home": tmp_path / "empty"}))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UnavailableError, match="MLflow"):
        world.follow(settings=given(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}))
    world.bundles = tmp_path / "not" / "mounted"
    with pytest.raises(ConfigurationError, match="where the volume of bundles is mounted"):
        world.follow()
    assert world.patches() == before
    assert user_config(world.server).get("revision", 0) == 0


@pytest.mark.timeout(600)
def test_the_command(world: World, tmp_path: Path) -> None:
    """As the CronJob calls it, with the replicas asked at the API's address and through the Kubernetes API."""
    world.promote("first")
    settings = environment_for(world.settings, OVERTONE_API_KEY=KEY, LOG_FORMAT="json", LOG_LEVEL="INFO")
    settings.pop("MLFLOW_TRACKING_URI", None)
    kubeconfig = str(tmp_path / "kubeconfig")

    def run(*words: str, code: int = 0) -> tuple[Any, list[dict[str, Any]]]:
        command = [sys.executable, "-m", "overtone.cli", "k8s", "--kubeconfig", kubeconfig, "follow", *words]
        command += ["--bundles", str(world.bundles), "--timeout", "60s"]
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == code, done.stderr
        logged = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        return (json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout), logged

    told, logged = run("--json", "--api", world.server.address)
    assert told == {
        "outcome": "rolled_out",
        "reason": "it is not served yet",
        "champion": world.versions["first"],
        "registry": "1",
        "folder": str(world.bundles / world.versions["first"]),
        "dry_run": False,
    }
    assert [one["message"] for one in logged] == ["champion.fetched", "champion.followed"]
    assert logged[-1]["champion"] == world.versions["first"]
    assert KEY not in json.dumps(logged)
    shown, _ = run()
    assert shown == f"{world.versions['first']} (version 1): served: it is served.\n"
    world.promote("second")
    settings["OVERTONE_API_KEY"] = "another-key-of-20-chars"
    told, logged = run("--json", "--api", world.server.address, code=4)
    assert (told, logged) == ("", [])
    assert world.served == world.versions["first"]
