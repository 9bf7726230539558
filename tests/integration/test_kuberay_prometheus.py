"""A real Prometheus with the rules of the product scrapes its metrics, and evaluates every rule without an error."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml

from overtone import metrics
from overtone.ports import free_ports

CONFIGS = Path(__file__).parents[2] / "configs" / "prometheus"


@pytest.fixture
def exporter() -> Iterator[str]:
    """`GET /metrics` as a replica answers it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = metrics.exposition(None)
            self.send_response(200)
            self.send_header("Content-Type", metrics.CONTENT_TYPE)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def prometheus(exporter: str, tmp_path: Path) -> Iterator[str]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt install prometheus)")
    config = yaml.safe_load((CONFIGS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIGS / "alerts.yaml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [exporter]}]
    del config["alerting"]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_ports(1)[0]
    options = {
        "config.file": tmp_path / "prometheus.yaml",
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [program, *(f"--{name}={value}" for name, value in options.items())], stdout=log, stderr=log
        )
    yield f"http://127.0.0.1:{port}/api/v1"
    server.terminate()
    server.wait(20)


def ask(address: str, path: str, **query: str) -> Any:
    try:
        return httpx.get(f"{address}/{path}", params=query, timeout=5).json()["data"]
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def test_prometheus_scrapes_the_product_and_evaluates_its_rules(prometheus: str) -> None:
    metrics.QUEUE_TEXTS.set(7)
    deadline = time.monotonic() + 60
    while True:
        found = ask(prometheus, "query", query="overtone_serve_queue_texts")
        groups = (ask(prometheus, "rules") or {}).get("groups", [])
        rules = [rule for group in groups for rule in group["rules"]]
        if found and found["result"] and rules and all(rule["health"] != "unknown" for rule in rules):
            break
        assert time.monotonic() < deadline, (found, rules)
        time.sleep(0.2)
    assert found["result"][0]["value"][1] == "7"
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) > 10
    assert ask(prometheus, "query", query='up{job="overtone"}')["result"][0]["value"][1] == "1"
    assert "OvertoneApiAbsent" not in {rule["name"] for rule in rules if rule.get("state") == "firing"}
