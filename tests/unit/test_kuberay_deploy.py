"""The files of other ways to deploy, against the code they name; scripts of the images that need no network."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuberay.build import build_overlay
from overtone import __version__
from overtone.settings import Settings

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))
FIELDS = {name.upper() for name in Settings.model_fields}


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.prod.yml").read_text())
    return found


def test_every_run_step_is_a_script_with_the_tools_to_check_it() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for step in re.findall(r"^RUN (.*)$", text, re.MULTILINE):
        script = re.search(r"sh (?:docker|/usr/local/lib/overtone)/(\S+\.sh)", step)
        assert script, step
        assert ROOT / "docker" / script[1] in SCRIPTS
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000:1000"] * 3
    assert all(":latest" not in line for line in text.splitlines())
    for source in re.findall(r"^COPY (?!--)([^\n]*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert "set -eu" in script.read_text()


def test_what_the_image_needs_is_not_ignored() -> None:
    kept = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    text = (ROOT / "Dockerfile").read_text()
    copied = {
        name.rstrip("/") for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in source.split()
    }
    assert copied <= set(kept)


def test_the_bill_of_materials_names_what_is_installed() -> None:
    out = subprocess.run(
        [sys.executable, ROOT / "docker" / "sbom.py"], check=True, capture_output=True, text=True
    ).stdout
    bill = json.loads(out)
    assert bill["bomFormat"] == "CycloneDX"
    versions = {each["name"]: each["version"] for each in bill["components"]}
    assert versions["ray"].startswith("2.60")
    assert versions["overtone"] == __version__


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check_asks_the_server(status: int | None, code: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 500)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/ready"
        if status is not None:
            threading.Thread(target=server.handle_request, daemon=True).start()
        else:
            server.server_close()
        result = subprocess.run([sys.executable, ROOT / "docker" / "healthy.py", address], check=False)
    assert result.returncode == code


def test_compose_is_whole() -> None:
    stack = compose()
    assert set(stack["services"]) == {
        "overtone", "postgres", "redis", "mlflow", "prometheus", "alertmanager", "grafana"
    }  # fmt: skip
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, service in stack["services"].items():
        assert "healthcheck" in service, name
        assert re.search(r":v?\d+\.\d+", service["image"]), service["image"]
        assert service["cap_drop"] == ["ALL"]
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in dockerfile
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in stack["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing listens beyond loopback unless told to"
    assert set(stack["services"]["overtone"]["environment"]) <= FIELDS


def test_single_container_forms_give_settings_that_there_are() -> None:
    (task,) = json.loads((ROOT / "deploy/ecs-task.json").read_text())["containerDefinitions"]
    given = {each["name"] for each in task["environment"] + task["secrets"]}
    run = yaml.safe_load((ROOT / "deploy/cloud-run.yaml").read_text())["spec"]["template"]["spec"]["containers"][0]
    given |= {each["name"] for each in run["env"]}
    railway = json.loads((ROOT / "railway.json").read_text())
    given |= set(re.findall(r"([A-Z_]+)=", railway["deploy"]["startCommand"]))
    assert given <= FIELDS
    assert task["image"] == run["image"] == f"ghcr.io/overtone/overtone:{__version__}"


def test_alerts_and_dashboards_are_those_of_the_cluster() -> None:
    documents = build_overlay("production")
    rules = next(each for each in documents if each["kind"] == "PrometheusRule")
    ours = yaml.safe_load((ROOT / "configs/prometheus/alerts.yaml").read_text())["groups"]
    theirs = [
        {**group, "rules": [rule for rule in group["rules"] if rule.get("alert") != "OvertoneHeadDown"]}
        for group in rules["spec"]["groups"]
    ]
    assert ours == theirs
    dashboard = next(each for each in documents if "overtone.json" in each.get("data", {}))
    assert json.loads(dashboard["data"]["overtone.json"]) == json.loads(
        (ROOT / "configs/grafana/overtone.json").read_text()
    )


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    return found


@pytest.mark.parametrize("kind", ["rules", "config"])
def test_promtool_takes_rules_and_configuration(kind: str) -> None:
    name = {"rules": "alerts.yaml", "config": "prometheus.yaml"}[kind]
    result = subprocess.run(
        [promtool(), "check", kind, str(ROOT / "configs/prometheus" / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    ok, bad = 'http_requests_total{route="/predict",status="200"}', 'http_requests_total{route="/predict",status="503"}'
    tests = {
        "rule_files": [str(ROOT / "configs/prometheus/alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": ok, "values": "0+600x20"}, {"series": bad, "values": series}],
                "alert_rule_test": [{"eval_time": "15m", "alertname": "OvertoneErrorRateHigh", "exp_alerts": alerts}],
            }
            for series, alerts in (
                ("0+1x20", []),
                (
                    "0+200x20",
                    [
                        {
                            "exp_labels": {"severity": "critical"},
                            "exp_annotations": {
                                "summary": "25% of requests fail.",
                                "runbook_url": "https://overtone.example.com/docs/kubernetes#overtoneerrorratehigh",
                            },
                        }
                    ],
                ),
            )
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(tests))
    result = subprocess.run([promtool(), "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_terraform_is_formatted() -> None:
    terraform = shutil.which("terraform")
    if terraform is None:
        pytest.skip("terraform is not installed")
    result = subprocess.run(
        [terraform, "fmt", "-check", str(ROOT / "deploy/terraform")], capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout
