"""The environment of Ray and the script that starts HAProxy."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overtone.errors import EnvironmentProblemError
from serve.environment import haproxy_pids, is_loopback, runtime_folder, serve_environment, write_pod_script

TEMPLATE = """\
global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    timeout connect 5s
    log global
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
listen stats
  bind *:8404
  stats enable
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    # Sockets need a short path, which the folder pytest gives is not.
    folder = runtime_folder(tmp_path)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_haproxy_mode_and_the_optimised_mode_go_together(folder: Path) -> None:
    variables = serve_environment(host="127.0.0.1", folder=folder)

    assert variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1" or variables["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"


def test_only_a_loopback_host_keeps_ray_on_loopback(folder: Path) -> None:
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

    assert serve_environment(host="127.0.0.1", folder=folder)[name] == "0"
    assert name not in serve_environment(host="0.0.0.0", folder=folder)


def edited(script: Path, folder: Path) -> Path:
    """Ray's configuration after `script` had it, which passes its arguments on."""
    shown = folder / "shown.sh"
    shown.write_text(script.read_text().rpartition("exec ")[0] + 'echo "$@"\n')
    config = folder / "haproxy.cfg"
    config.write_text(TEMPLATE)
    done = subprocess.run(
        ["sh", str(shown), "-db", "-f", str(config), "-sf", "1"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["-db", "-f", str(config), "-sf", "1"]
    return config


def test_in_a_pod_the_metrics_alone_stay_on_the_network(folder: Path, tmp_path: Path) -> None:
    config = edited(write_pod_script(folder), tmp_path).read_text()

    assert [line.split(maxsplit=1)[1] for line in config.splitlines() if " bind " in line] == [
        ":9101",
        "127.0.0.1:8000",
        f"unix@{folder}/stats.sock mode 600",
        f"unix@{folder}/last.sock mode 600",
    ]
    assert "mode 666" not in config


def test_the_script_closes_what_ray_leaves_open(folder: Path, tmp_path: Path) -> None:
    script = Path(serve_environment(host="127.0.0.1", folder=folder)["RAY_SERVE_HAPROXY_BINARY_PATH"])
    config = edited(script, tmp_path)

    assert [line.split(maxsplit=1)[1] for line in config.read_text().splitlines() if " bind " in line] == [
        f"unix@{folder}/metrics.sock mode 600",
        "127.0.0.1:8000",
        f"unix@{folder}/stats.sock mode 600",
        f"unix@{folder}/last.sock mode 600",
    ]
    assert "mode 666" not in config.read_text()
    assert "514" not in config.read_text()
    waits = r"^defaults\n(?: .*\n)* *option http-buffer-request\n *timeout http-request 30s$"
    assert re.search(waits, config.read_text(), re.MULTILINE)
    assert re.findall(r"timeout connect .*", config.read_text()) == ["timeout connect 250ms"]
    assert script.stat().st_mode & 0o777 == 0o700


def test_the_runtime_folder_is_private_and_the_same_again(folder: Path, tmp_path: Path) -> None:
    serve_environment(host="127.0.0.1", folder=folder)

    assert folder.stat().st_mode & 0o077 == 0
    assert runtime_folder(tmp_path) == folder
    assert runtime_folder(tmp_path / "other") != folder


def test_a_folder_that_sockets_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match="too long"):
        serve_environment(host="127.0.0.1", folder=tmp_path / ("x" * 60))


def test_a_link_planted_in_its_place_is_refused(folder: Path, tmp_path: Path) -> None:
    if folder.is_dir():
        folder.rmdir()
    folder.symlink_to(tmp_path)
    try:
        with pytest.raises(EnvironmentProblemError, match="belongs to another"):
            serve_environment(host="127.0.0.1", folder=folder)
    finally:
        folder.unlink()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_no_haproxy_runs_for_a_stack_that_was_never_started(folder: Path) -> None:
    assert haproxy_pids(folder) == []
