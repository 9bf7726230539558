"""The benchmark's own arithmetic and its load generator: a figure is only as good as these."""

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.bare_engine import usable_cores
from benchmarks.client import Tally, content_length, figures, run
from benchmarks.load import Load, Target
from benchmarks.results import Result, machine, ratio, write
from benchmarks.texts import read_texts, synthetic_texts
from overtone.errors import DataError

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


def test_the_rate_is_taken_between_the_first_and_the_last_answer() -> None:
    tally = Tally(0, 0, 0, answered_at=[10.0, 10.5, 11.0, 12.0], latencies=[0.1, 0.2, 0.3, 0.4])
    result = figures(tally)
    assert result["requests_per_s"] == 1.5
    assert result["p50_ms"] == pytest.approx(300)


def test_no_answers_are_no_rate() -> None:
    assert figures(Tally(0, 0, 0))["requests_per_s"] == 0


def test_full_requests_only_are_sent_and_the_key_is_kept_private(tmp_path: Path) -> None:
    Load(TARGET, "/predict/batch", ["a", "b", "c", "d", "e"], batch=2, folder=tmp_path)
    bodies = [json.loads(line) for line in (tmp_path / "predict_batch.jsonl").read_text().splitlines()]
    assert bodies == [{"texts": ["a", "b"]}, {"texts": ["c", "d"]}]
    assert (tmp_path / "predict_batch.headers").stat().st_mode & 0o077 == 0


def test_few_texts_fill_a_request_by_repeating(tmp_path: Path) -> None:
    Load(TARGET, "/predict/batch", ["a", "b"], batch=5, folder=tmp_path)
    assert json.loads((tmp_path / "predict_batch.jsonl").read_text()) == {"texts": ["a", "b", "a", "b", "a"]}


def test_the_length_is_read_from_the_head() -> None:
    assert content_length(b"http/1.1 200 ok\r\ncontent-length: 12\r\nx: y") == 12
    assert content_length(b"http/1.1 204 no content") == 0


@pytest.mark.parametrize(("status", "refused"), [(b"200 OK", False), (b"429 Too Many Requests", True)])
async def test_the_client_counts_answers_and_refusals(status: bytes, refused: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            # In two parts, as large answers come.
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nab")
            await writer.drain()
            writer.write(b"cd")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await run("127.0.0.1", port, [b"POST / HTTP/1.1\r\n\r\n"], connections=3, seconds=0.05)
    assert result["requests"] >= 6
    assert (result["refused"] > 0) is refused
    assert result["failed"] == 0


async def test_a_connection_that_the_server_closes_is_a_failure() -> None:
    def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await run("127.0.0.1", port, [b"x"], connections=2, seconds=0.05)
    assert result["failed"] == 2
