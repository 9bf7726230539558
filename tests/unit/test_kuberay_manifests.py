"""The manifests against schemas, and every name in them against the code that gives it its meaning."""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from kuberay.build import OVERLAYS, Document, apply_patch, build, build_overlay, identity, overlay_names
from overtone import __version__, metrics
from overtone.errors import ManifestError, NotFoundError
from overtone.settings import Settings, secret_names
from serve.environment import runtime_folder, serve_environment

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.34"
OURS = "ghcr.io/overtone/overtone:"
CUSTOM = ("ray.io", "cnpg.io", "coreos.com", "external-secrets.io")
UNUSED_SECRETS = {"WANDB_API_KEY", "ERASURE_SIGNING_KEY", "VAULT_TOKEN"}
"""Settings with a secret that no manifest gives: nothing in a cluster needs them unless an operator asks for it."""
LIBRARIES = {"OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"}
MADE_BY_OPERATORS = {"overtone-db-app": {"uri"}, "overtone-ray-token": {"auth_token"}}
"""Secrets that CloudNativePG and KubeRay write."""


@functools.cache
def documents(overlay: str) -> list[Document]:
    return build_overlay(overlay)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from walk(each)


def everything() -> Iterator[dict[str, Any]]:
    for overlay in overlay_names():
        yield from walk(documents(overlay))


def containers() -> list[dict[str, Any]]:
    found = [each for each in everything() if "image" in each and "name" in each]
    assert len(found) > 30
    return found


@pytest.mark.parametrize("overlay", overlay_names())
def test_kubectl_builds_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    result = subprocess.run(
        [kubectl, "kustomize", str(OVERLAYS / overlay)], capture_output=True, text=True, check=False
    )
    if "unknown command" in result.stderr or "unknown flag" in result.stderr:
        pytest.skip("this kubectl cannot kustomize")
    assert result.returncode == 0, result.stderr
    theirs = {identity(each): each for each in yaml.safe_load_all(result.stdout)}
    assert {identity(each): each for each in documents(overlay)} == theirs


@pytest.mark.parametrize("overlay", overlay_names())
def test_kubernetes_own_kinds_fit_their_schemas(overlay: str) -> None:
    checked = 0
    for document in documents(overlay):
        if not document["apiVersion"].split("/")[0].endswith(CUSTOM):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            checked += 1
    assert checked > 20


@functools.cache
def crd_validator(kind: str) -> jsonschema.protocols.Validator:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(path.read_text(), Loader=loader)
    version = next(each for each in crd["spec"]["versions"] if each["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    return jsonschema.validators.validator_for(schema)(schema)


def closed(schema: Any) -> Any:
    """The schema with objects closed to fields it does not name, as the API server prunes them."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
        out["additionalProperties"] = False
    return out


def without_metadata(document: Document) -> Document:
    return {key: value for key, value in document.items() if key != "metadata"}


@pytest.mark.parametrize("overlay", overlay_names())
def test_ray_kinds_fit_kuberays_schemas(overlay: str) -> None:
    service = next(each for each in documents(overlay) if each["kind"] == "RayService")
    crd_validator("RayService").validate(without_metadata(service))
    broken = apply_patch(service, [{"op": "add", "path": "/spec/rayClusterConfig/headGroupSpec/imagePull", "value": 1}])
    with pytest.raises(jsonschema.ValidationError, match="imagePull"):
        crd_validator("RayService").validate(without_metadata(broken))


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # in Ray's schema
@pytest.mark.parametrize("overlay", overlay_names())
def test_the_serve_config_is_one_that_ray_and_the_application_take(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import JobsArgs, ServeArgs
    from serve.environment import APPLICATION, DEPLOYMENT, JOBS_APPLICATION, ROUTE_PREFIX
    from serve.rollout import LiveOptions

    service = next(each for each in documents(overlay) if each["kind"] == "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    application, consumers = config["applications"]
    assert (consumers["name"], consumers["route_prefix"]) == (JOBS_APPLICATION, None)
    jobs = JobsArgs.model_validate(consumers["args"])
    assert (application["name"], application["route_prefix"]) == (APPLICATION, ROUTE_PREFIX)
    args = ServeArgs.model_validate(application["args"])
    (deployment,) = application["deployments"]
    assert deployment["name"] == DEPLOYMENT
    LiveOptions.model_validate(deployment["user_config"])
    groups = {each["groupName"]: each for each in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert args.pool is not None
    assert (jobs.pool, jobs.metrics_folder) == (args.pool, args.metrics_folder)
    group = groups[args.pool]
    assert group["labels"] == {"pool": args.pool}
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert args.gpus <= float(limits.get("nvidia.com/gpu", 0))
    mounts = {each["mountPath"] for each in group["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert args.metrics_folder in mounts
    room = group["maxReplicas"] * int(limits["cpu"]) // args.threads
    assert (args.max_replicas or args.replicas or 1) <= room


def test_images_are_pinned_and_ours_can_be_built() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    used = set()
    for container in containers():
        name, _, tag = container["image"].rpartition(":")
        assert name, f"{container['image']}: has no tag"
        assert tag not in {"latest", "main", ""}
        if container["image"].startswith(OURS):
            version, _, variant = tag.partition("-")
            assert version == __version__
            used.add(variant or "cpu")
    assert used == targets & {"cpu", "cuda", "mlflow"} == {"cpu", "cuda", "mlflow"}


def ray_names() -> set[str]:
    """Every RAY_* name in Ray's own Python source where it reads its environment."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    files = [
        "serve/_private/constants.py",
        "_private/ray_constants.py",
        "_common/usage/usage_constants.py",
        "dashboard/consts.py",
        "train/v2/_internal/constants.py",
        "_private/authentication/authentication_constants.py",
    ]
    text = "\n".join((root / name).read_text() for name in files if (root / name).is_file())
    # Ray reads settings of its C++ side as RAY_<name>; `RAY_AUTH_MODE` and its like are read there.
    return set(re.findall(r"RAY_\w+", text)) | {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def given_variables() -> set[str]:
    names = {
        variable["name"]
        for container in containers()
        if container["image"].startswith(OURS) and not container["image"].endswith("-mlflow")
        for variable in container.get("env", [])
    }
    for overlay in overlay_names():
        settings = next(each for each in documents(overlay) if identity(each)[2] == "overtone-settings")
        names |= set(settings["data"])
    return names


def mounted_secrets() -> Iterator[tuple[str, str, str]]:
    """Secret, key and file of what is mounted as files."""
    for part in everything():
        for source in (part.get("projected") or {}).get("sources", []):
            for item in source["secret"]["items"]:
                yield source["secret"]["name"], item["key"], item["path"]


def test_every_variable_in_a_manifest_is_read_by_something() -> None:
    fields = {name.upper() for name in Settings.model_fields}
    unknown = given_variables() - fields - LIBRARIES - ray_names()
    assert unknown == set()


def test_every_secret_setting_is_given_by_a_manifest() -> None:
    """Other settings can be put into the ConfigMap as they are; a secret must be asked for by name."""
    secrets = {name.upper() for name in secret_names()}
    files = {path for _, _, path in mounted_secrets()}
    assert secrets - given_variables() - files - UNUSED_SECRETS == set(), "give it in kuberay/base, or name it here"
    assert files <= secrets


def test_secrets_are_looked_for_where_they_are_mounted() -> None:
    """As files, because variables of a process that runs cannot change."""
    service = next(each for each in documents("production") if each["kind"] == "RayService")
    found = 0
    for container in walk(service):
        mounts = {each["mountPath"]: each for each in container.get("volumeMounts", [])}
        variables = {each["name"]: each.get("value") for each in container.get("env", [])}
        if "SECRETS_FROM" not in variables:
            assert not any("secrets" in path for path in mounts)
            continue
        assert mounts[variables["SECRETS_FROM"].removeprefix("file://")]["readOnly"] is True
        assert not {name.upper() for name in secret_names()} & set(variables)
        found += 1
    assert found == 6, "the head, four groups, and the reader beside Ray"


def test_secrets_may_come_from_vault(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kuberay" / "components", tmp_path / "components")
    shutil.copytree(ROOT / "kuberay" / "base", tmp_path / "base")
    shutil.copytree(OVERLAYS, tmp_path / "overlays")
    (tmp_path / "overlays" / "own").mkdir()
    parts = {"resources": ["../production"], "components": ["../../components/vault"]}
    (tmp_path / "overlays" / "own" / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    found = build(tmp_path / "overlays" / "own")
    store = next(each for each in found if each["kind"] == "SecretStore")
    account = store["spec"]["provider"]["vault"]["auth"]["kubernetes"]["serviceAccountRef"]["name"]
    assert list(store["spec"]["provider"]) == ["vault"]
    assert ("ServiceAccount", "overtone", account) in {identity(each) for each in found}


def test_values_of_settings_are_valid() -> None:
    for overlay in overlay_names():
        settings = next(each for each in documents(overlay) if identity(each)[2] == "overtone-settings")
        Settings(_env_file=None, **{name.lower(): value for name, value in settings["data"].items()})


def test_every_secret_key_has_a_source_and_a_use() -> None:
    used = {(name, key) for name, key, _ in mounted_secrets()}
    for part in everything():
        for field in ("secretKeyRef", "accessKeyId", "secretAccessKey"):
            if isinstance(part.get(field), dict):
                used.add((part[field]["name"], part[field]["key"]))
        if "authOptions" in part:
            used.add((part["authOptions"]["secretName"], "auth_token"))
    made = {(name, key) for name, keys in MADE_BY_OPERATORS.items() for key in keys}
    for document in documents("production"):
        if document["kind"] == "ExternalSecret":
            made |= {(document["spec"]["target"]["name"], each["secretKey"]) for each in document["spec"]["data"]}
    assert used == made
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    assert all(f"`{name}`" in guide and f"`{key}`" in guide for name, key in used)


def test_ports_agree_with_the_variables_that_choose_them() -> None:
    service = next(each for each in documents("production") if each["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    container = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert (
        ports["serve"]
        == config["http_options"]["port"]
        == int(variables["API_PORT"])
        == Settings(_env_file=None).api_port
    )
    assert ports["haproxy"] == int(variables["RAY_SERVE_HAPROXY_METRICS_PORT"])
    assert ports["replica"] == int(variables["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    grace = cluster["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > 35 + int(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])


def test_haproxy_runs_in_a_pod_as_everywhere_else(tmp_path: Path) -> None:
    """With the same script and figures, but for those that a pod must have otherwise."""
    service = next(each for each in documents("production") if each["kind"] == "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    given = {each["name"]: each["value"] for each in head["env"] if each["name"].startswith("RAY_SERVE_HAPROXY_")}
    script = given.pop("RAY_SERVE_HAPROXY_BINARY_PATH").removeprefix("/usr/local/lib/overtone/")
    assert "COPY docker/ /usr/local/lib/overtone/" in (ROOT / "Dockerfile").read_text()
    assert os.access(ROOT / "docker" / script, os.X_OK)
    folder = runtime_folder(tmp_path)
    ours = serve_environment(host="0.0.0.0", folder=folder)
    shutil.rmtree(folder)
    other = {f"RAY_SERVE_HAPROXY_{name}" for name in ("METRICS_PORT", "HARD_STOP_AFTER_S")}
    assert {name: value for name, value in given.items() if name not in other}.items() <= ours.items()
    own = {"METRICS_ENABLED", "NBTHREAD", "CONFIG_FILE_LOC", "SOCKET_PATH", "SERVER_STATE_BASE", "SERVER_STATE_FILE"}
    kept = {name for name in ours if name.startswith("RAY_SERVE_HAPROXY_")} - {f"RAY_SERVE_HAPROXY_{x}" for x in own}
    assert kept - {"RAY_SERVE_HAPROXY_BINARY_PATH"} <= set(given)


def test_every_named_port_of_a_monitor_is_one_of_the_pods_it_selects() -> None:
    pods = [
        (
            part["metadata"]["labels"],
            {port["name"] for each in part["spec"]["containers"] for port in each.get("ports", [])},
        )
        for part in everything()
        if isinstance(part.get("spec"), dict) and "containers" in part["spec"] and "labels" in part.get("metadata", {})
    ]
    for monitor in (each for each in documents("production") if each["kind"] == "PodMonitor"):
        selector = monitor["spec"]["selector"]
        chosen = [ports for labels, ports in pods if selects(selector, labels)]
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert chosen
        assert all(wanted <= ports for ports in chosen)


def test_policies_and_budgets_select_pods_that_there_are() -> None:
    labels = [part["metadata"]["labels"] for part in everything() if "containers" in (part.get("spec") or {})]
    for document in documents("production"):
        selector = document["spec"].get("podSelector") if document["kind"] == "NetworkPolicy" else None
        selector = document["spec"].get("selector") if document["kind"] == "PodDisruptionBudget" else selector
        if selector and "cnpg.io/cluster" not in selector.get("matchLabels", {}):
            assert any(selects(selector, each) for each in labels), identity(document)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def test_pods_are_restricted_and_bounded() -> None:
    for container in containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    for pod in (part["spec"] for part in everything() if "containers" in (part.get("spec") or {})):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["priorityClassName"] in {"overtone-serve", "overtone-ingest", "overtone-batch"}


def test_only_the_api_is_open() -> None:
    policies = {identity(each)[2]: each["spec"] for each in documents("production") if each["kind"] == "NetworkPolicy"}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    from_outside = {
        (name, port["port"])
        for name, spec in policies.items()
        for rule in spec.get("ingress", [])
        if any("namespaceSelector" in peer for peer in rule["from"])
        for port in rule["ports"]
    }
    assert {port for name, port in from_outside if name == "allow-api"} == {8000}
    assert {name for name, _ in from_outside} == {"allow-api", "allow-ray", "allow-metrics", "allow-postgres"}


def exported_names() -> set[str]:
    names: set[str] = set()
    for value in vars(metrics).values():
        if isinstance(value, Counter | Gauge | Histogram):
            (family,) = list(value.describe())
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}[family.type]
            names |= {family.name + suffix for suffix in suffixes}
    assert len(names) > 30
    assert any(each.name in names for each in REGISTRY.collect())
    return names


def asked_names() -> set[str]:
    expressions: list[str] = []
    for document in documents("production"):
        if document["kind"] == "PrometheusRule":
            expressions += [rule["expr"] for group in document["spec"]["groups"] for rule in group["rules"]]
        if document["kind"] == "ConfigMap" and "grafana_dashboard" in document["metadata"].get("labels", {}):
            for text in document["data"].values():
                panels = json.loads(text)["panels"]
                expressions += [target["expr"] for panel in panels for target in panel["targets"]]
    names = set(
        re.findall(r"(?<![:\w])(?:overtone|http|sentiment|celery|ray|haproxy)_[a-z0-9_]+", " ".join(expressions))
    )
    assert len(names) > 20
    return names


def test_every_metric_that_is_asked_for_is_exported() -> None:
    unknown = {name for name in asked_names() - exported_names() if not name.startswith(("ray_", "haproxy_"))}
    assert unknown == set()


def test_ray_exports_what_is_asked_of_it() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    agent = (Path(spec.origin).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    for name in asked_names():
        if name.startswith("ray_"):
            assert f'"{name.removeprefix("ray_")}"' in agent


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_names()}
    asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked_names()}
    assert families - asked == set(), "add a panel to kuberay/components/monitoring/dashboards.yaml"


def test_commands_in_manifests_exist() -> None:
    from typer.main import get_command

    from overtone.cli.app import app

    text = "\n".join(" ".join(c.get("command", []) + c.get("args", [])) for c in containers())
    for words in set(re.findall(r"overtone ([a-z][a-z0-9]*(?: [a-z]+)?)", text)):
        command: Any = get_command(app)
        for word in words.split():
            command = command.commands[word]
    for module in set(re.findall(r"python -m (\w+)", text)):
        assert (ROOT / module / "__main__.py").is_file()
        tree = ast.unparse(ast.parse((ROOT / module / "__main__.py").read_text()))
        call = text[text.index(f"python -m {module}") :].split("\n")[0]
        for flag in re.findall(r"--([a-z-]+)", call):
            assert flag in tree or flag.replace("-", "_") in tree, flag
    for path in set(re.findall(r"configs/[\w./-]+", text)):
        assert (ROOT / path).is_file()


def test_the_cron_that_retrains_says_what_both_commands_take() -> None:
    from typer.main import get_command

    from overtone.cli.app import app
    from train.__main__ import app as train
    from train.retrain import Order, entrypoint

    retrain: Any = get_command(app)
    for container in containers():
        if container["name"] == "retrain":
            words = [*container["command"], *container["args"]]
            given = retrain.commands["retrain"].make_context("retrain", words[2:]).params
            assert (given["check"], given["label"]) == (True, ["pool=train-a100"])
            order = Order(tuple(given["arguments"]))
            command = shlex.split(entrypoint(order, Settings(_env_file=None), "retrain-1", with_feedback=True))
            told = get_command(train).make_context("train", command[3:]).params
            assert (told["output"], told["run_name"], told["keep_runs"]) == (None, "retrain-1", 3)
            assert told["from_feedback"] is True
            assert str(told["gate"]) == "/models/data/apart.tsv"


def test_the_cron_that_follows_the_champion_may_do_what_it_does_and_no_more() -> None:
    from typer.main import get_command

    from overtone.cli.app import app

    root: Any = get_command(app)
    for overlay in overlay_names():
        found = {(each["kind"], each["metadata"]["name"]): each for each in documents(overlay)}
        cron = found["CronJob", "overtone-follow"]["spec"]
        assert (cron["concurrencyPolicy"], cron["suspend"]) == ("Forbid", overlay != "production")
        template = cron["jobTemplate"]["spec"]["template"]
        pod, labels = template["spec"], template["metadata"]["labels"]
        (container,) = pod["containers"]
        words = [*container["command"], *container["args"]]
        given = root.commands["k8s"].commands["follow"].make_context("follow", words[3:]).params
        assert (given["as_json"], given["force"], given["dry_run"]) == (True, False, False)

        service = found["RayService", "overtone"]
        assert given["api"] == f"http://{service['metadata']['name']}-serve-svc:8000"
        replica = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
        assert volume_of(pod, given["bundles"].parent) == volume_of(replica, given["bundles"].parent) is not None

        (subject,) = found["RoleBinding", "overtone-follow"]["subjects"]
        assert pod["serviceAccountName"] == subject["name"]
        assert found["ServiceAccount", subject["name"]]
        (rule,) = found["Role", found["RoleBinding", "overtone-follow"]["roleRef"]["name"]]["rules"]
        assert (rule["resources"], rule["resourceNames"]) == (["rayservices"], [service["metadata"]["name"]])
        assert set(rule["verbs"]) == {"get", "list", "watch", "patch"}

        policies = [each["spec"] for each in documents(overlay) if each["kind"] == "NetworkPolicy"]
        mine = [each for each in policies if each["podSelector"] and selects(each["podSelector"], labels)]
        ports = {port["port"] for each in mine for rule in each.get("egress", []) for port in rule["ports"]}
        assert ports == {443, 5000, 6443, 8000}
        opened = {
            each["podSelector"]["matchLabels"].get("app.kubernetes.io/name", "postgres")
            for each in policies
            for rule in each.get("ingress", [])
            if any(selects(peer["podSelector"], labels) for peer in rule["from"] if "podSelector" in peer)
        }
        assert opened - {"postgres"} == ({"ray"} if overlay == "dev" else {"ray", "mlflow"})


def volume_of(pod: dict[str, Any], folder: Path) -> Any:
    """The claim of the volume that the first container of `pod` has at `folder`."""
    name = next(each["name"] for each in pod["containers"][0]["volumeMounts"] if each["mountPath"] == str(folder))
    return next(each for each in pod["volumes"] if each["name"] == name).get("persistentVolumeClaim")


def test_alerts_have_a_paragraph_in_the_guide() -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    for document in documents("production"):
        if document["kind"] == "PrometheusRule":
            for rule in (rule for group in document["spec"]["groups"] for rule in group["rules"] if "alert" in rule):
                assert f"### {rule['alert']}\n" in guide
                assert rule["annotations"]["runbook_url"].endswith(f"#{rule['alert'].lower()}")


def test_the_builder_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: a-\n")
    with pytest.raises(ManifestError, match="namePrefix is not supported"):
        build(tmp_path)
    with pytest.raises(NotFoundError, match="nor one of dev, gpu"):
        build_overlay("staging")
    for operation in ({"op": "replace", "path": "/a/b", "value": 1}, {"op": "move", "path": "/kind", "from": "/a"}):
        with pytest.raises(ManifestError):
            apply_patch({"kind": "x"}, [operation])
