"""The benchmark's own arithmetic and its load generator: a figure is only as good as these."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.client import Stream, arrivals, content_length, run
from benchmarks.load import Load, Target, batch_bodies, in_groups
from benchmarks.results import Result, machine, ratio, write
from benchmarks.samples import closed_figures, growth, open_figures, percentile, recovery_s
from benchmarks.texts import read_texts, synthetic_texts, with_long_texts
from overtone.bundle import Bundle
from overtone.errors import ConfigurationError, DataError
from overtone.hardware import usable_cores

TARGET = Target("http://127.0.0.1:1", "X-API-Key", "secret")


def test_synthetic_texts_are_the_same_for_the_same_seed() -> None:
    assert synthetic_texts(50) == synthetic_texts(50)
    assert synthetic_texts(50) != synthetic_texts(50, seed=8)
    assert all(text.strip() for text in synthetic_texts(50))


def test_texts_are_read_from_the_column_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.tsv"
    path.write_text('label\ttext\nneutral\tsays "hi\nneutral\t \npositive\tb\n')
    assert read_texts(path) == ['says "hi', "b"]


@pytest.mark.parametrize("content", ["label\tbody\na\tb\n", "text\n", ""])
def test_a_file_without_texts_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "texts.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=r"texts\.tsv"):
        read_texts(path)


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    result = ratio([8, 9, 1], [10, 10, 10], unit_of="texts")
    assert result.value == 0.8
    assert result.detail == {"samples": [0.8, 0.9, 0.1], "unit_of": "texts"}


def test_the_results_file_names_machine_commit_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    write({"a.b": Result(0.5, "ratio", True, {"samples": [0.5]})}, path, model_version="m-1", quick=True)
    content = json.loads(path.read_text())
    assert content["machine"]["cores"] == machine()["cores"] == usable_cores()
    assert content["results"]["a.b"] == {
        "value": 0.5,
        "unit": "ratio",
        "higher_is_better": True,
        "detail": {"samples": [0.5]},
    }
    assert "commit" in content


def rows(*entries: tuple[float, float, float, int]) -> np.ndarray:
    return np.array(entries, dtype=np.float64).reshape(-1, 4)


def closed_loop(connections: int, service_s: float, seconds: float, *, is_shared: bool) -> np.ndarray:
    """What a server of one request in `service_s` gives: in order of arrival, or a like share to all under way."""
    done: list[tuple[float, float, float, int]] = []
    now, under_way = 0.0, [[0.0, service_s] for _ in range(connections)]  # when sent, work left
    while under_way:
        at_once = len(under_way) if is_shared else 1
        step = min(left for _, left in under_way[:at_once])
        now += step * at_once
        for request in under_way[:at_once]:
            request[1] -= step
        ended = [request for request in under_way if request[1] <= 1e-9]
        under_way = [request for request in under_way if request[1] > 1e-9]
        done += [(sent, sent, now, 200) for sent, _ in ended]
        if now < seconds or len(done) < 2 * connections:
            under_way += [[now, service_s] for _ in ended]
    return rows(*done)


@given(st.integers(1, 8), st.floats(0.05, 1.0), st.floats(2, 10), st.booleans())
def test_the_rate_of_a_closed_loop_is_the_servers(
    connections: int, service_s: float, seconds: float, is_shared: bool
) -> None:
    figures = closed_figures(
        closed_loop(connections, service_s, seconds, is_shared=is_shared), connections, counted_from=seconds / 6
    )
    assert figures.requests_per_s == pytest.approx(1 / service_s, rel=0.02)


def test_a_closed_loop_leaves_out_the_answers_before_it_is_counted() -> None:
    figures = closed_figures(
        rows((0, 0, 1, 200), (9.9, 9.9, 10.0, 200), (10.3, 10.3, 10.5, 200), (11.6, 11.6, 12.0, 429)), 1, counted_from=5
    )
    assert figures.p50_ms == pytest.approx(100)
    assert figures.statuses == {"200": 2, "429": 1}


def test_no_answers_are_no_rate() -> None:
    assert closed_figures(rows(), 1, 0).requests_per_s == 0


def test_an_open_loop_counts_latency_from_when_a_request_was_due() -> None:
    figures = open_figures(rows((1.0, 1.5, 2.0, 200), (1.2, 1.5, 1.6, 429), (8, 8, 8.1, 200)), start=0, end=4)
    assert figures.p99_ms == pytest.approx(1000)
    assert figures.requests_per_s == 0.25
    assert figures.refusal_p99_ms == pytest.approx(400)
    assert figures.late_p99_ms == pytest.approx(500)
    assert figures.statuses == {"200": 1, "429": 1}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_a_sample_that_enough_samples_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6


def test_recovery_ends_with_the_last_request_that_was_not_served_as_usual() -> None:
    calm = [(10.0 + step, 10.0 + step, 10.1 + step, 200) for step in range(5)]
    assert recovery_s(rows(*calm), end=10, usual_ms=150) == 0
    assert recovery_s(rows(*calm, (10.5, 10.5, 10.6, 503)), end=10, usual_ms=150) == 0.5
    assert recovery_s(rows(*calm, (11.5, 11.5, 14.6, 200)), end=10, usual_ms=150) == 1.5
    assert recovery_s(rows(*calm, (14.5, 14.5, 14.6, 503)), end=10, usual_ms=150) == float("inf")
    assert recovery_s(rows(), end=10, usual_ms=150) == float("inf")


def test_growth_leaves_the_warm_up_out() -> None:
    assert growth([1, 1, 100, 100, 110, 110]) == 0.1
    assert growth([1, 2]) == 0


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0.1, 5)), max_size=4), st.integers(0, 99))
def test_arrivals_are_in_order_and_within_their_phases(phases: list[tuple[float, float]], seed: int) -> None:
    due = list(arrivals(phases, seed))
    assert due == sorted(due) == list(arrivals(phases, seed))
    start = 0.0
    for rate, seconds in phases:
        if rate == 0:
            assert not [at for at in due if start < at < start + seconds]
        start += seconds
    assert all(0 <= at <= start for at in due)


def test_arrivals_come_at_their_rate() -> None:
    due = list(arrivals(((100.0, 100.0), (300.0, 100.0)), seed=3))
    assert len([at for at in due if at < 100]) == pytest.approx(10_000, rel=0.05)
    assert len([at for at in due if at >= 100]) == pytest.approx(30_000, rel=0.05)


def test_every_tenth_text_of_the_mix_is_long() -> None:
    texts = [f"text {number}" for number in range(30)]
    mixed = with_long_texts(texts)
    assert [number for number, text in enumerate(mixed) if text != texts[number]] == [0, 10, 20]
    assert mixed[0].startswith("text 0 text 1 ")


def test_full_requests_only_are_sent_and_few_texts_are_repeated() -> None:
    assert batch_bodies(["a", "b", "c", "d", "e"], 2) == [{"texts": ["a", "b"]}, {"texts": ["c", "d"]}]
    assert in_groups(["a", "b"], 5) == [["a", "b", "a", "b", "a"]]


def test_the_key_is_kept_private(tmp_path: Path) -> None:
    Load(TARGET, "/predict", [{"text": "a"}], 1, tmp_path)
    (headers,) = tmp_path.rglob("headers")
    assert headers.stat().st_mode & 0o077 == 0


def test_the_length_is_read_from_the_head() -> None:
    assert content_length(b"http/1.1 200 ok\r\ncontent-length: 12\r\nx: y") == 12
    assert content_length(b"http/1.1 204 no content") == 0
    assert content_length(b"http/1.1 200 ok\r\ntransfer-encoding: chunked") is None


def stream(folder: Path, *, rate: float, seconds: float, connections: int) -> Stream:
    (folder / "bodies").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "headers").write_text("X-Key: k\n")
    files = (str(folder / "bodies"), str(folder / "headers"))
    return Stream("it", "/predict", *files, connections, ((rate, seconds),))


@pytest.mark.parametrize("head", [b"200 OK\r\nContent-Length: 4\r\n\r\nab", b"429 No\r\nContent-Length: 4\r\n\r\nab"])
@pytest.mark.parametrize("rate", [0, 200.0])
async def test_the_client_writes_down_answers_and_refusals(tmp_path: Path, head: bytes, rate: float) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            # In two parts, as large answers come.
            writer.write(b"HTTP/1.1 " + head)
            await writer.drain()
            writer.write(b"cd")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        seen = (await run("127.0.0.1", port, [stream(tmp_path, rate=rate, seconds=0.1, connections=3)]))["it"]
    assert len(seen) >= 6
    assert set(seen[:, 3]) == {float(head[:3])}
    assert (seen[:, 0] <= seen[:, 1]).all()
    assert (seen[:, 1] <= seen[:, 2]).all()


async def test_chunked_answers_are_read_to_their_end(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
            await writer.drain()
            writer.write(b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        seen = (await run("127.0.0.1", port, [stream(tmp_path, rate=0, seconds=0.05, connections=1)]))["it"]
    assert set(seen[:, 3]) == {200}


@pytest.mark.parametrize("rate", [0, 100.0])
async def test_a_request_that_is_never_answered_has_no_status(tmp_path: Path, rate: float) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        seen = (await run("127.0.0.1", port, [stream(tmp_path, rate=rate, seconds=0.05, connections=2)]))["it"]
    assert set(seen[:, 3]) <= {0.0}


def test_engines_are_measured_beside_a_plain_session_and_what_cannot_run_is_told(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    app = Typer()
    app.command()(gpu.main)
    options = (
        f"--bundle {tiny_bundle.path} --engine onnx-cpu --engine onnx-cuda --tokens 64 --tokens 256 --seconds 0.05"
    )
    more = f"--rounds 2 --provider CPUExecutionProvider --output {output}"
    said = CliRunner().invoke(app, f"{options} {more}".split())
    assert said.exit_code == 0, said.output
    written = json.loads(output.read_text())
    speed = written["results"]["gpu.onnx-cpu.64.ratio_to_plain"]
    assert len(speed["detail"]["samples"]) == 2
    assert speed["detail"]["texts_per_s"] > 0
    assert written["results"]["gpu.onnx-cpu.lone_text"]["value"] > 0
    assert "no CUDA device" in written["unavailable"]["onnx-cuda"]


def test_an_engine_that_there_is_not_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(ConfigurationError, match="--engine cuda: choose from auto, onnx-cpu"):
        gpu.main(bundle=tiny_bundle.path, engine=["cuda"])
