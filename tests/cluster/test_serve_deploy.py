"""`serve deploy` of the configuration file, on a Ray instance with its dashboard, as the manifests and people do it."""

import sys
from pathlib import Path

import httpx
import pytest
import yaml

from live_stack import LIKED, started, until
from overtone.bundle import Bundle
from serve.environment import APPLICATION

CONFIG = Path(__file__).parents[2] / "configs" / "serve" / "app.yaml"
SERVE = str(Path(sys.executable).parent / "serve")


@pytest.mark.timeout(600)
def test_the_file_is_deployed_and_its_user_config_changes_the_bundle_in_place(
    session_postgres_url: str, serving_bundle: Bundle, other_bundle: Bundle, tmp_path: Path
) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    file = tmp_path / "app.yaml"
    with started(session_postgres_url, serving_bundle, has_dashboard=True) as stack:
        dashboard = f"http://127.0.0.1:{stack.dashboard_port}"

        def deploy() -> None:
            file.write_text(yaml.safe_dump(config))
            stack.run(SERVE, "deploy", str(file), "--address", dashboard)

        def state() -> str:
            answer = httpx.get(f"{dashboard}/api/serve/applications/", timeout=30)
            found = answer.json()["applications"].get(APPLICATION, {})
            assert found.get("status") != "DEPLOY_FAILED", found
            return str(found.get("status"))

        def version() -> str:
            with stack.client() as client:
                answer = client.post("/predict", json={"text": LIKED})
                assert (answer.status_code, answer.json()["label"]) == (200, "positive"), answer.text
                return str(answer.json()["model_version"])

        def is_reachable() -> bool:
            try:
                return httpx.get(f"{dashboard}/api/version", timeout=30).status_code == 200
            except httpx.HTTPError:
                return False

        until(is_reachable, 60)
        config["http_options"]["port"] = stack.port
        config["applications"][0]["args"]["replicas"] = 1
        deploy()
        until(lambda: state() == "RUNNING", 120)
        stack.await_replicas(1)
        assert version() == serving_bundle.version
        before = {process.pid for process in stack.replicas()}

        config["applications"][0]["deployments"][0]["user_config"]["bundle"] = str(other_bundle.path)
        deploy()
        until(lambda: version() == other_bundle.version, 60)
        assert {process.pid for process in stack.replicas()} == before
