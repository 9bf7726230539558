"""Replicas come with the work and go without it, and one that goes answers all that it has."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.mmap_dict import MmapedDict

from live_stack import LARGE, LIKED, Stack, asking, failures, until


def batches_of(stack: Stack, pid: int) -> float:
    """How many batch requests the replica `pid` has answered with 200, by its own count."""
    rows = MmapedDict.read_all_values_from_file(str(stack.metrics_folder / f"counter_{pid}.db"))
    return sum(row[1] for row in rows if all(f'"{it}"' in row[0] for it in ("/predict/batch", "200", "POST")))


def busy_clients(stack: Stack, seconds: float) -> int:
    """How many large requests are about so many seconds of work on this machine, 64 at most."""
    with stack.client() as client:
        took = []
        for _ in range(3):
            began = time.monotonic()
            client.post("/predict/batch", json=LARGE).raise_for_status()
            took.append(time.monotonic() - began)
    return min(64, max(6, round(seconds / min(took))))


def test_a_replica_that_is_taken_away_answers_what_it_has(stack: Stack) -> None:
    stack.deploy(replicas=2)
    stack.await_replicas(2)
    pids = {process.pid for process in stack.replicas()}
    clients = busy_clients(stack, 8.0)

    with (
        asking(stack, 2) as single,
        asking(stack, clients, "/predict/batch", LARGE) as large,
        ThreadPoolExecutor(1) as pool,
    ):
        until(lambda: len(single) >= 20 and len(large) >= clients)
        deploying = pool.submit(stack.deploy, replicas=1)
        until(lambda: len(stack.listening()) == 1)  # one takes no further request; it has some that wait
        closed = {pid: batches_of(stack, pid) for pid in pids}
        deploying.result()
        stack.await_replicas(1)
        answered = len(single)
        until(lambda: len(single) >= answered + 20)

    # Requests as large as these cannot be sent to another replica again: one that was lost would show.
    assert failures(large) == []
    assert failures(single) == []
    [gone] = pids - {process.pid for process in stack.replicas()}
    assert batches_of(stack, gone) > closed[gone]


def test_a_stream_goes_on_while_its_replica_is_taken_away(stack: Stack) -> None:
    stack.deploy(replicas=2)
    stack.await_replicas(2)
    is_over = threading.Event()
    sent = [0, 0]

    def stream(which: int) -> httpx.Response:
        with stack.client() as client:
            headers = {"content-type": "application/x-ndjson"}
            return client.post("/predict/batch", content=lines(which), headers=headers)

    def lines(which: int) -> Iterator[bytes]:
        for number in itertools.count():
            # Wide ones at first: HAProxy hands a request on when it has all of it, or its buffer is full.
            sent[which] += 1
            yield json.dumps(LIKED).encode() + b" " * (4000 if number < 40 else 0) + b"\n"
            if number >= 40 and is_over.wait(0.02):
                return

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(stream, which) for which in range(2)]  # one to each replica
        try:
            until(lambda: all(number > 60 for number in sent))
            deploying = pool.submit(stack.deploy, replicas=1)
            until(lambda: len(stack.listening()) == 1)
            assert len(stack.replicas()) == 2
        finally:
            is_over.set()
        answers = [each.result() for each in streams]
        deploying.result()

    for answer, number in zip(answers, sent, strict=True):
        assert answer.status_code == 200
        assert [json.loads(line)["label"] for line in answer.text.splitlines()] == ["positive"] * number
    stack.await_replicas(1)


def test_replicas_come_with_waiting_tokens_and_go_when_idle(stack: Stack) -> None:
    stack.deploy(min_replicas=1, max_replicas=2, scale_up_delay_s=0, scale_down_delay_s=1)
    stack.await_replicas(1)

    with asking(stack, 2, pause_s=0.1) as single:
        with asking(stack, 6, "/predict/batch", LARGE) as large:
            stack.await_replicas(2, 90)
            answered = len(large)
            until(lambda: len(large) >= answered + 6)
        stack.await_replicas(1, 90)

    assert failures(single) == []
    assert failures(large) == []
