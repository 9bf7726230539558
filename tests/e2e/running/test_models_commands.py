"""`overtone models` on the whole stack: what the commands say is what callers get, and no caller notices the change."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from overtone.bundle import DEFAULT_BUNDLE, Bundle, BundleSpec, Golden, TextEncoder, load_bundle, write_bundle
from overtone.engine import open_engine

pytestmark = pytest.mark.timeout(600)

LIKED = "I love this"
RARE = "worst movie, horrible, dreadful and atrocious"
COMMON = "the"
"""The tokenizer numbers words by how common they are: this one has a low number, some of those above have high ones."""
ROWS = 6_000


class Stack(Protocol):
    """The whole product, as the fixture `stack` starts it."""

    api_url: str
    headers: dict[str, str]
    environment: dict[str, str]

    def overtone(self, *arguments: str, code: int = 0) -> str: ...


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def made(folder: Path, name: str, *, label: str, rows: int) -> Bundle:
    """A bundle with the default one's tokenizer that calls all texts `label`, and fails on tokens from `rows` on."""
    folder.mkdir()
    default = load_bundle(None)
    weights = np.zeros((rows, len(default.labels)), dtype=np.float32)
    weights[:, default.labels.index(label)] = 1.0
    nodes = [
        helper.make_node("Gather", ["weights", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "l"]) for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(default.labels)])]
    constants = {"weights": weights, "last": np.array([-1]), "middle": np.array([1])}
    values = [numpy_helper.from_array(value, each) for each, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    shutil.copy(default.tokenizer_path, folder)
    scores = tuple(1 / len(default.labels) for _ in default.labels)
    spec = BundleSpec(name, default.labels, default.max_length, 1.0, "fp32", (Golden(COMMON, scores),))
    draft = write_bundle(folder, spec=spec)
    [found] = open_engine(draft).classify(TextEncoder(draft).encode([COMMON]))
    return write_bundle(folder, spec=replace(spec, golden=(Golden(COMMON, tuple(map(float, found))),)))


@pytest.fixture(scope="module")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that calls everything negative."""
    vocabulary = len(json.loads((DEFAULT_BUNDLE / "tokenizer.json").read_text())["model"]["vocab"])
    return made(tmp_path_factory.mktemp("bundles") / "contrary", "contrary", label="negative", rows=vocabulary)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that is fit by its golden texts, and fails on texts with rare words."""
    return made(tmp_path_factory.mktemp("bundles") / "fragile", "fragile", label="positive", rows=ROWS)


def replicas(stack: Stack) -> dict[str, dict[str, Any]]:
    """What `GET /models` says, by replica; each look is a connection of its own, so that they take turns."""
    answers = [httpx.get(f"{stack.api_url}/models", headers=stack.headers, timeout=30).json() for _ in range(6)]
    return {answer["replica"]: answer for answer in answers}


@contextlib.contextmanager
def asking(stack: Stack, text: str) -> Iterator[list[httpx.Response]]:
    """Four clients that ask about `text` all the time, on both replicas; every answer so far."""
    answers: list[httpx.Response] = []
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=stack.api_url, headers=stack.headers, timeout=30) as client:
            while not done.is_set():
                answers.append(client.post("/predict", json={"text": text}))
                done.wait(0.005)  # a shadow looks when nothing waits

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        try:
            yield answers
        finally:
            done.set()
    for client in clients:
        client.result()
    assert [f"{answer.status_code} {answer.text}" for answer in answers if answer.status_code != 200] == []


def version_of(answer: httpx.Response) -> str:
    return str(answer.json()["model_version"])


def test_a_shadow_tells_where_it_disagrees_and_answers_nothing(stack: Stack, contrary: Bundle) -> None:
    default = load_bundle(None)
    with asking(stack, LIKED) as answers:
        said = json.loads(stack.overtone("models", "shadow", "1.0", "--bundle", str(contrary.path), "--json"))
        ordered = len(answers)
        until(lambda: all(it["challenger"]["shadow"]["compared"] >= 20 for it in replicas(stack).values()))

    assert (said["state"], said["rollout"]["shadow"]) == ("done", 1.0)
    assert {version_of(answer) for answer in answers[ordered:]} == {default.version}
    listed = json.loads(stack.overtone("models", "list", "--json"))
    for replica in listed["replicas"]:
        shadow = replica["challenger"]["shadow"]
        assert replica["challenger"]["version"] == contrary.version
        assert shadow["agreement"] < 1
        # Posts of the simulator are looked at too.
        assert {pair["challenger"] for pair in shadow["labels"]} == {"negative"}
        assert "positive" in {pair["champion"] for pair in shadow["labels"]}
    stack.overtone("models", "shadow", "0")
    assert {it["challenger"] is None for it in replicas(stack).values()} == {True}


def test_promote_changes_what_answers_and_rollback_changes_it_back(stack: Stack, contrary: Bundle) -> None:
    default = load_bundle(None)
    with asking(stack, LIKED) as answers:
        until(lambda: len(answers) >= 20)
        stack.overtone("models", "promote", str(contrary.path))
        promoted = len(answers)
        until(lambda: len(answers) >= promoted + 20)
        stack.overtone("models", "rollback")
        returned = len(answers)
        until(lambda: len(answers) >= returned + 20)

    # Those that were under way when the command returned may be from before.
    after = answers[promoted + 4 : promoted + 20]
    assert {(version_of(it), it.json()["label"]) for it in after} == {(contrary.version, "negative")}
    assert {(version_of(it), it.json()["label"]) for it in answers[returned + 4 :]} == {(default.version, "positive")}
    assert {it["champion"]["version"] for it in replicas(stack).values()} == {default.version}


def test_a_canary_that_fails_is_taken_back_by_itself_and_no_caller_notices(stack: Stack, fragile: Bundle) -> None:
    default = load_bundle(None)
    stack.overtone("models", "canary", "0.5", "--bundle", str(fragile.path))
    with asking(stack, LIKED) as answers:
        until(lambda: {version_of(it) for it in answers} == {default.version, fragile.version})

    with asking(stack, RARE) as answers:
        until(lambda: all(it["challenger"]["canary"]["share"] == 0 for it in replicas(stack).values()))
        taken_back = len(answers)
        until(lambda: len(answers) >= taken_back + 20)

    assert {version_of(it) for it in answers[taken_back:]} == {default.version}
    said = stack.overtone("models", "list", code=8)
    assert "requests failed" in said
    assert "The canary was taken back" in said
    stack.overtone("models", "canary", "0")
    assert "champion" in stack.overtone("models", "list")


def test_a_damaged_bundle_is_refused_and_nothing_changes(stack: Stack, contrary: Bundle, tmp_path: Path) -> None:
    damaged = shutil.copytree(contrary.path, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes(b"not a model")
    before = replicas(stack)

    for order in (["promote", str(damaged)], ["canary", "0.5", "--bundle", str(damaged)]):
        assert "sha256" in stack.overtone("models", *order, code=8)

    assert replicas(stack) == before
