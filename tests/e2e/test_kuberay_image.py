"""The RUN steps of the Dockerfile, in their order: what they make works for a user who may write nothing else."""

import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PARTS = ("docker", "overtone", "serve", "train", "ingest", "kuberay", "configs")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder every user may pass through, unlike pytest's own."""
    found = Path(tempfile.mkdtemp(prefix="ovt-image-", dir="/tmp"))
    found.chmod(0o755)
    yield found
    shutil.rmtree(found, ignore_errors=True)


@pytest.fixture(scope="module")
def system() -> dict[str, str]:
    """The environment of the steps: with an interpreter that every user may run, as the images have."""
    check = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    try:
        found = subprocess.run(["/usr/bin/python3", "-c", check], capture_output=True, check=False).returncode
    except FileNotFoundError:
        found = 1
    if found:
        pytest.skip("no /usr/bin/python3 of 3.11 to 3.13 with venv")
    return {**os.environ, "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}


@pytest.fixture(scope="module")
def wheels(folder: Path, system: dict[str, str]) -> Path:
    source = folder / "source"
    for name in PARTS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        ["sh", DOCKER / "make-wheel.sh", source, folder / "wheels"],
        capture_output=True,
        text=True,
        check=False,
        env=system,
    )
    assert done.returncode == 0, done.stderr
    return folder / "wheels"


@pytest.fixture(scope="module")
def user() -> Iterator[pwd.struct_passwd]:
    """A user without rights: one made by the step that makes it, or whoever runs the tests."""
    if os.geteuid() != 0:
        yield pwd.getpwuid(os.geteuid())
        return
    name, number = f"ovt-{os.getpid()}", 60_000 + os.getpid() % 5_000
    subprocess.run(["sh", DOCKER / "make-user.sh", name, str(number)], check=True)
    yield pwd.getpwnam(name)
    subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


def as_user(user: pwd.struct_passwd) -> dict[str, Any]:
    """How to run a process as `user`."""
    is_other = user.pw_uid != os.geteuid()
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if is_other else {}


@pytest.mark.timeout(900)
def test_the_steps_need_no_rights(folder: Path, wheels: Path, system: dict[str, str], user: pwd.struct_passwd) -> None:
    """The wheel is built and installed by a user who may write to one folder of their own."""
    own, scripts = folder / "own", folder / "source" / "docker"
    own.mkdir(mode=0o700)
    if user.pw_uid != os.geteuid():
        os.chown(own, user.pw_uid, user.pw_gid)
    clean = {"HOME": str(own), "TMPDIR": str(own), "PATH": system["PATH"]}
    clean |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}

    def step(*words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            check=False,
            env=clean,
            cwd=own,
            umask=0o077,
            **as_user(user),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    step("sh", scripts / "make-wheel.sh", folder / "source", own / "wheels")
    assert {path.name for path in (own / "wheels").iterdir()} == {path.name for path in wheels.iterdir()}
    step("sh", scripts / "install.sh", own / "wheels", own / "opt", "")
    assert "positive" in step(own / "opt" / "bin" / "overtone", "predict", "--local", "--json", "I love this")


@pytest.mark.timeout(900)
def test_the_wheel_is_installed_and_runs_for_a_user_without_rights(
    folder: Path, wheels: Path, system: dict[str, str], user: pwd.struct_passwd
) -> None:
    prefix = folder / "opt"
    done = subprocess.run(
        ["sh", DOCKER / "install.sh", wheels, prefix, "kube,archive,secrets,registry"],
        capture_output=True,
        text=True,
        check=False,
        env=system,
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads((prefix / "sbom.json").read_text())
    names = {each["name"] for each in bill["components"]}
    assert {"overtone", "ray", "onnxruntime", "kubernetes", "boto3", "hvac", "mlflow-skinny"} <= names
    assert not {"torch", "pytest", "ruff"} & names, "an image for serving has none of these"

    def run(*words: str, **variables: str) -> Any:
        return subprocess.run(
            [str(prefix / "bin" / "overtone"), *words],
            **as_user(user),
            cwd=user.pw_dir,
            env={"HOME": user.pw_dir, "PATH": f"{prefix}/bin:/usr/bin:/bin", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    rendered = run("k8s", "render", "production", "--json")
    assert rendered.returncode == 0, rendered.stderr
    assert len(json.loads(rendered.stdout)) > 40, "manifests are in the wheel"
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    asked = run("models", "pull", "champion", **nowhere)
    assert "listing versions failed" in asked.stderr, "the registry's client is there, its server is not"
    said = run("predict", "--local", "--json", "I love this", "what a terrible day")
    assert said.returncode == 0, said.stderr
    assert "positive" in said.stdout
    assert "negative" in said.stdout
