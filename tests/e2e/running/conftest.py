"""The whole product, started once for all tests of this folder as a user starts it in the background."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from overtone.ports import free_ports


@dataclass
class RunningStack:
    """A stack that is up, and the command line of its home."""

    api_url: str
    home: Path
    environment: dict[str, str]
    sign_in_url: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What a call of the API needs."""
        return {"X-API-Key": (self.home / "api_key").read_text().strip()}

    def overtone(self, *arguments: str, code: int = 0) -> str:
        """What `overtone` prints with `arguments`; it must end with `code`."""
        command = [sys.executable, "-m", "overtone.cli", *arguments]
        said = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=240)
        assert said.returncode == code, said.stdout + said.stderr
        return said.stdout + (said.stderr if code else "")


@pytest.fixture(scope="package")
def stack() -> Iterator[RunningStack]:
    """A stack in a home of its own, stopped after the tests of this folder, which leave its champion as it was."""
    home = Path(tempfile.mkdtemp(prefix="overtone-e2e-", dir="/tmp"))
    port = free_ports(1)[0]
    unset = {"TWITTER_BEARER_TOKEN", "X_API_BASE_URL", "DATABASE_URL", "OVERTONE_API_KEY", "API_HOST"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OVERTONE_HOME": str(home), "API_PORT": str(port)}
    stack = RunningStack(f"http://127.0.0.1:{port}", home, environment)
    try:
        stack.overtone("up", "--detach", "--no-dashboard")
        status: dict[str, Any] = json.loads(stack.overtone("status", "--json", "--link"))
        stack.sign_in_url = _link_in(status)
        yield stack
    finally:
        stack.overtone("down")
        shutil.rmtree(home, ignore_errors=True)


def _link_in(status: dict[str, Any]) -> str:
    links = [value for value in _strings(status) if "/sign-in?token=" in value]
    assert len(links) == 1, status.keys()
    return links[0]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
