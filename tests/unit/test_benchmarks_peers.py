"""The peers beside which we are measured: their code compiles, their needs are pinned, ratios are ours over theirs."""

import compileall
import json
import re
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from benchmarks.compare import Side, Trial, trial_results
from benchmarks.load import Outcome
from benchmarks.peers.catalogue import NAMES, PEERS, Peer, peer_named
from benchmarks.peers.environments import LOCK
from benchmarks.peers.hub import write_hub_folder
from benchmarks.report import END, START, draw, table, with_table
from overtone.bundle import load_bundle

_PIN = re.compile(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[A-Za-z0-9.+!]+")


@pytest.mark.parametrize("peer", PEERS, ids=NAMES)
def test_the_code_of_a_peer_compiles(peer: Peer) -> None:
    assert (peer.folder / "server.py").is_file()
    assert compileall.compile_dir(peer.folder, quiet=2, force=True)


@pytest.mark.parametrize("peer", PEERS, ids=NAMES)
def test_what_a_peer_needs_is_pinned(peer: Peer) -> None:
    wanted = (peer.folder / "requirements.txt").read_text().split()
    locked = (peer.folder / LOCK).read_text().split()
    assert wanted
    assert [line for line in wanted + locked if not _PIN.fullmatch(line)] == []
    assert {re.sub(r"\[.*\]", "", _plain(line)) for line in wanted} <= {_plain(line) for line in locked}


@pytest.mark.parametrize("module", ["benchmarks.peers.model", "benchmarks.peers.hub"])
def test_what_peers_share_imports_in_their_environments(module: str) -> None:
    users = [peer for peer in PEERS if module in (peer.folder / "server.py").read_text()]
    assert users
    locks = [{_plain(line.split("==")[0]) for line in (peer.folder / LOCK).read_text().split()} for peer in users]
    has = set.intersection(*locks)
    lacking = [
        name for name, of in packages_distributions().items() if "overtone" not in of and not has & {*map(_plain, of)}
    ]
    # None makes an import fail as if the package were not installed.
    command = f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); import {module}"
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize("peer", PEERS, ids=NAMES)
def test_a_peer_says_how_it_is_tuned_and_why(peer: Peer) -> None:
    assert peer.tuning
    assert all(": " in choice for choice in peer.tuning)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("litserve", {"predictions": [{"label": "a"}, {"label": "b"}]}),
        ("bentoml", [{"label": "a"}, {"label": "b"}]),
        (
            "infinity",
            {"data": [[{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}], [{"label": "b", "score": 1}]]},
        ),
        ("mlserver", {"outputs": [{"name": "label", "data": ["a", "b"]}]}),
        ("fastapi", {"predictions": [[{"label": "a", "score": 0.9}], [{"label": "b", "score": 1}]]}),
    ],
)
def test_labels_are_read_from_an_answer(name: str, answer: object) -> None:
    assert peer_named(name).labels(answer) == ["a", "b"]


def test_a_body_holds_every_text() -> None:
    for peer in PEERS:
        body = json.dumps(peer.body(["first text", "second text"]))
        assert "first text" in body
        assert "second text" in body


def test_a_bundle_becomes_a_hub_folder(tmp_path: Path) -> None:
    bundle = load_bundle()
    folder = write_hub_folder(bundle, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == list(bundle.labels)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == bundle.max_length
    assert (folder / "model.onnx").stat().st_size == bundle.model_path.stat().st_size


def outcome(texts_per_s: float) -> Outcome:
    return Outcome(10, texts_per_s, 1.0, 2.0, 0.1, "wrk")


def test_a_ratio_is_the_best_of_ours_around_over_the_best_of_theirs() -> None:
    before = Side(single={8: outcome(90), 64: outcome(100)}, batch={32: outcome(500)})
    after = Side(single={8: outcome(80), 64: outcome(140)}, batch={32: outcome(700)})
    theirs = Side(single={8: outcome(60), 64: outcome(30)})
    results = trial_results(peer_named("litserve"), [Trial(before, theirs, after)])
    assert results["peers.litserve.single.ratio"].value == 2.0
    assert "peers.litserve.batch.ratio" not in results


def test_the_table_holds_what_was_measured_and_why_the_rest_was_not() -> None:
    content = {
        "machine": {"processor": "CPU", "cores": 2},
        "commit": "abc",
        "rounds": 2,
        "unavailable": {"peers.bentoml": "did not start\nlog"},
        "results": {
            "serve.batch256.ratio_to_engine": {"value": 0.93, "unit": "ratio", "detail": {}},
            "peers.litserve.single.ratio": {"value": 2.5, "unit": "ratio", "detail": {"title": "LitServe"}},
        },
    }
    text = table(content)
    assert "| 0.93x |" in text
    assert "| LitServe | 2.50x | - | - |" in text
    assert "bentoml could not be measured: did not start" in text
    assert "single.c64" not in text
    assert '`make bench-full ARGS="--rounds 2"` on CPU, 2 cores, commit abc' in text


def test_the_plots_show_every_peer_that_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    before, theirs = Side(single={64: outcome(100)}, batch={256: outcome(500)}), Side(single={64: outcome(30)})
    results = trial_results(peer_named("litserve"), [Trial(before, theirs, before)])
    content = {"results": {name: asdict(result) for name, result in results.items()}}
    single, batch = draw(json.loads(json.dumps(content)), tmp_path)
    assert "LitServe" in single.read_text()
    assert "LitServe" not in batch.read_text()
    assert "Overtone" in batch.read_text()


def test_the_table_replaces_what_is_between_the_markers_only() -> None:
    text = f"before\n{START}\nold\n{END}\nafter\n"
    assert with_table(text, "new") == f"before\n{START}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="benchmarks: start"):
        with_table("no markers", "new")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
