"""The application on the whole stack: answers, hostile bodies, killed replicas and changes of the bundle under load."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from live_stack import DISLIKED, LIKED, Stack, asking, failures, until
from overtone.bundle import Bundle, TextEncoder
from overtone.engine import open_engine
from overtone.schema import MAX_BATCH_TEXTS, MAX_TEXT_CHARS

_SWAP = """
import json, sys
import ray
from serve.app import ServeArgs, deploy
arguments = json.loads(sys.argv[1])
ray.init(address=arguments["address"], namespace="overtone", log_to_driver=False)
for number in range(20):
    live = {"bundle": arguments["bundles"][number % 2], "revision": number + 1}
    deploy(ServeArgs(**arguments["args"], live=live), host="127.0.0.1", port=arguments["port"])
"""


def test_texts_are_classified(stack: Stack, serving_bundle: Bundle) -> None:
    with stack.client() as client:
        one = client.post("/predict", json={"text": LIKED})
        many = client.post("/predict/batch", json={"texts": [LIKED, DISLIKED] * 150})

    assert (one.status_code, one.json()["label"]) == (200, "positive")
    assert one.json()["model_version"] == serving_bundle.version
    assert [item["label"] for item in many.json()["predictions"]] == ["positive", "negative"] * 150
    assert len(one.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/predict", json.dumps({"text": "x" * 100_000}).encode(), 422),
        ("/predict", b'{"text": ""}', 422),
        ("/predict/batch", json.dumps({"texts": ["a"] * (MAX_BATCH_TEXTS + 1)}).encode(), 422),
        ("/predict", b'{"text": ', 400),
        ("/predict", b'{"text": 7}', 422),
        ("/predict", b'{"text": "\\ud800"}', 422),
        ("/predict", b'{"text": "a\\u0000b"}', 422),
        ("/predict", b"x" * (65 * 2**20), 413),
    ],
)
def test_hostile_bodies_are_refused_and_the_server_stays_up(stack: Stack, path: str, body: bytes, status: int) -> None:
    with stack.client() as client:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text[:300]
        assert response.json()["errors"][0]["field"]
        assert client.post("/predict", json={"text": "x" * MAX_TEXT_CHARS}).status_code == 200


def test_calls_without_a_key_are_refused(stack: Stack) -> None:
    assert httpx.post(f"{stack.url}/predict", json={"text": LIKED}).status_code == 401


def test_figures_come_from_the_database(stack: Stack) -> None:
    with stack.client() as client:
        assert client.get("/stats").json()["posts"] == 0


def test_metrics_are_the_sum_of_all_replicas(stack: Stack) -> None:
    def count(client: httpx.Client) -> float:
        text = client.get("/metrics").text
        assert re.search(r"^(?!#)(ray|autoscaler|serve)_", text, re.MULTILINE) is None
        found = re.search(r'^http_requests_total\{method="POST",route="/predict",status="200"\} ([\d.]+)$', text, re.M)
        return float(found[1]) if found else 0.0

    with stack.client() as client:
        before = count(client)
    for _ in range(30):  # a connection each, so that both replicas get some
        with stack.client() as client:
            assert client.post("/predict", json={"text": LIKED}).status_code == 200
    with stack.client() as client:
        assert {count(client) for _ in range(6)} == {before + 30}
    written = {path.stem.rpartition("_")[2] for path in stack.metrics_folder.glob("counter_*.db")}
    assert {str(process.pid) for process in stack.replicas()} <= written


@pytest.mark.timeout(1200)
def test_twenty_replicas_killed_under_load_fail_only_what_they_held(stack: Stack) -> None:
    large = ["x " * 1000] * 60  # more than HAProxy can send to another replica again
    calls = [("/predict", {"text": LIKED})] * 6 + [("/predict/batch", {"texts": large})] * 2
    answered = dict.fromkeys({path for path, _ in calls}, 0)
    failed: list[httpx.Response] = []
    under_way: list[tuple[float, float]] = []  # when those that failed were sent and answered
    deaths: list[tuple[float, float]] = []  # from the signal until nothing of the process is left
    broken: list[str] = []
    done = threading.Event()

    def ask(path: str, body: dict[str, object]) -> None:
        with stack.client() as client:  # whose time limit is what an answer may take
            while not done.is_set():
                sent = time.monotonic()
                try:
                    answer = client.post(path, json=body)
                except httpx.HTTPError as error:
                    broken.append(f"{path}: {error!r}")
                    continue
                if answer.status_code == 200:
                    answered[path] += 1
                else:
                    failed.append(answer)
                    under_way.append((sent, time.monotonic()))

    with ThreadPoolExecutor(len(calls)) as pool:
        asking = [pool.submit(ask, *call) for call in calls]
        try:
            for _ in range(20):
                stack.await_replicas(2)
                before = answered["/predict"]
                replica = min(stack.replicas(), key=lambda process: process.pid)
                killed = time.monotonic()
                replica.kill()
                replica.wait(10)
                deaths.append((killed, time.monotonic()))
                until(lambda before=before: answered["/predict"] >= before + 20)
        except (TimeoutError, psutil.TimeoutExpired):
            broken.append(f"nothing is answered any more: {answered}, {[answer.text for answer in failed[-3:]]}")
        finally:
            done.set()
    for client in asking:
        client.result()

    assert broken == []
    assert answered["/predict/batch"] > 20
    shown = [(answer.status_code, answer.headers.get("retry-after"), answer.text) for answer in failed]
    assert {(status, json.loads(text)["code"]) for status, _, text in shown} <= {(503, "unavailable")}, shown
    assert all(retry_after for _, retry_after, _ in shown), shown
    assert {str(answer.request.url.path) for answer in failed} <= {"/predict/batch"}
    strays = [it for it in under_way if not any(it[0] <= gone and killed <= it[1] for killed, gone in deaths)]
    assert strays == []


def is_ready(stack: Stack) -> bool:
    return httpx.get(f"{stack.url}/ready").status_code == 200


def test_another_bundle_is_rolled_out_without_a_new_process_or_a_lost_request(
    stack: Stack, serving_bundle: Bundle, other_bundle: Bundle
) -> None:
    until(lambda: len(stack.replicas()) == 2 and is_ready(stack))
    before = {process.pid for process in stack.replicas()}

    with asking(stack) as answers:
        until(lambda: len(answers) >= 50)
        stack.deploy(replicas=2, live={"bundle": str(other_bundle.path)})
        answered = len(answers)
        until(lambda: len(answers) >= answered + 50)

    assert failures(answers) == []
    assert {call.version for call in answers} == {serving_bundle.version, other_bundle.version}
    assert {call.version for call in answers[answered + 8 :]} == {other_bundle.version}
    assert {process.pid for process in stack.replicas()} == before


@pytest.mark.timeout(600)
def test_twenty_swaps_under_load_lose_and_mix_up_nothing(
    stack: Stack, serving_bundle: Bundle, other_bundle: Bundle
) -> None:
    known = {}
    for bundle in (serving_bundle, other_bundle):
        scores = open_engine(bundle).classify(TextEncoder(bundle).encode([LIKED]))[0]
        known[bundle.version] = float(scores.max())
    wrong: list[str] = []
    counts = dict.fromkeys(known, 0)
    done = threading.Event()

    def ask() -> None:
        with stack.client() as client:
            while not done.is_set():
                answer = client.post("/predict", json={"text": LIKED})
                if answer.status_code != 200:
                    wrong.append(f"{answer.status_code} {answer.text[:200]}")
                    continue
                body = answer.json()
                counts[body["model_version"]] += 1
                if abs(body["confidence"] - known[body["model_version"]]) > 2e-3:
                    wrong.append(f"{body['model_version']}: {body['confidence']}")

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        bundles = (str(serving_bundle.path), str(other_bundle.path))
        try:
            stack.deploy(_SWAP, bundles, replicas=2)
        finally:
            done.set()
    for client in asking:
        client.result()

    assert wrong == []
    assert all(count > 20 for count in counts.values()), counts
    with stack.client() as client:
        models = client.get("/models").json()
    assert (models["revision"], models["champion"]["version"]) == (20, other_bundle.version)
