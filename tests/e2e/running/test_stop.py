"""`overtone down` while callers wait. Last of its folder: afterwards nothing runs."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from live_stack import LARGE, until

pytestmark = pytest.mark.timeout(600)


def test_a_stop_answers_what_is_under_way(stack: Any) -> None:
    answers: list[httpx.Response] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                answers.append(httpx.post(f"{stack.api_url}/predict/batch", headers=headers, json=LARGE, timeout=60))
            except httpx.ConnectError:  # it has not taken the request
                is_over.wait(0.05)

    headers = stack.headers
    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask) for _ in range(6)]
        try:
            until(lambda: len(answers) >= 6, 60)
            command = [sys.executable, "-m", "overtone.cli", "down"]
            stopping = subprocess.Popen(command, env=stack.environment, stdout=subprocess.DEVNULL)
            answered = len(answers)
            assert stopping.wait(120) == 0
        finally:
            is_over.set()
    for client in clients:
        client.result()

    assert len(answers) > answered
    assert [f"{answer.status_code} {answer.text[:200]}" for answer in answers if answer.status_code != 200] == []
