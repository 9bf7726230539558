"""Data sets of the Hugging Face hub, from a server that answers as the hub does."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from overtone.errors import DataError
from overtone.schema import LABELS
from train.sources import read_rows

COMMIT = "c" * 40
LISTING = "/api/datasets/ann/moods/tree/refs/convert/parquet"
FILES = "/datasets/ann/moods/resolve/refs/convert/parquet/"


def parquet(folder: Path, columns: dict[str, list[object]], names: tuple[str, ...] = ()) -> bytes:
    """A file as the hub makes it: labels are numbers, and what they stand for is in the metadata."""
    table = pa.table(columns)
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = folder / "made.parquet"
    pq.write_table(table, path)
    return path.read_bytes()


class Hub:
    """The two calls that listing and fetching files take."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                name = path.removeprefix(FILES)
                if path == LISTING:
                    listed = [
                        {"type": "file", "path": one, "size": len(body), "oid": "0"} for one, body in hub.files.items()
                    ]
                    self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
                elif name in hub.files:
                    if self.command == "GET":
                        hub.fetched.append(name)
                    etag = hashlib.sha256(hub.files[name]).hexdigest()
                    self._answer(200, hub.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                else:
                    self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

            def do_HEAD(self) -> None:
                self.do_GET()

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    # What HF_ENDPOINT sets, read when the package is imported.
    template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.server.shutdown()
    found.server.server_close()


def read(address: str) -> list[tuple[int, str, str, str]]:
    return [(row.line, row.label, row.text, row.annotator) for row in read_rows(Path(address), LABELS).rows]


def test_numbers_become_the_names_of_labels_and_parts_are_joined(hub: Hub, tmp_path: Path) -> None:
    first: dict[str, list[object]] = {"text": ["good", "so"], "label": [2, 1], "annotator": ["a", ""], "more": [1, 2]}
    second: dict[str, list[object]] = {"text": ["bad"], "label": [0], "annotator": ["b"], "more": [3]}
    hub.files = {
        "mood/train/0001.parquet": parquet(tmp_path, second, LABELS),
        "mood/train/0000.parquet": parquet(tmp_path, first, LABELS),
        "mood/test/0000.parquet": parquet(tmp_path, {"text": ["else"], "label": [0]}, LABELS),
        "README.md": b"",
    }
    expected = [(1, "positive", "good", "a"), (2, "neutral", "so", ""), (3, "negative", "bad", "b")]
    assert read("hf:ann/moods:train") == expected
    assert sorted(hub.fetched) == ["mood/train/0000.parquet", "mood/train/0001.parquet"]
    assert read("hf:ann/moods:mood:train") == expected
    assert len(hub.fetched) == 2, "what is in the cache is not fetched again"
    whole, other = (read_rows(Path(f"hf:ann/moods:{split}"), LABELS) for split in ("train", "test"))
    assert (whole.name, len(whole.sha256)) == ("hf:ann/moods:train", 64)
    assert whole.sha256 != other.sha256


def test_labels_in_words_are_taken_as_they_are(hub: Hub, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"text": ["good", "bad"], "label": ["positive", "negative"]}
    hub.files = {"default/train/0000.parquet": parquet(tmp_path, columns)}
    assert [row[1] for row in read("hf:ann/moods:train")] == ["positive", "negative"]


def test_what_is_wrong_is_told_by_row(hub: Hub, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"text": ["fine", "", "good", "secret"], "label": [0, 1, 2, -1]}
    hub.files = {"default/train/0000.parquet": parquet(tmp_path, columns, ("splendid", "neutral", "positive"))}
    with pytest.raises(DataError) as caught:
        read("hf:ann/moods:train")
    told = caught.value.message
    assert "hf:ann/moods:train: 1 row: label 'splendid' is not one of negative, neutral, positive (line 1)" in told
    assert "the text is empty (line 2)" in told
    assert "the label or the text is not a string (line 4)" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf:moods", "write a data set as hf:NAME:SPLIT"),
        ("hf:a:b:c:d", "write a data set as hf:NAME:SPLIT"),
        ("hf:ann/moods:train", "name one of its configurations: joy, mood"),
        ("hf:ann/moods:mood:dev", "there is joy:train, mood:train"),
        ("hf:ann/moods:joy:train", "no column text"),
        ("hf:ann/nowhere:train", "cannot be read from the hub"),
        ("hf:not a name:train", "cannot be read from the hub"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(hub: Hub, tmp_path: Path, address: str, told: str) -> None:
    hub.files = {
        "joy/train/0000.parquet": parquet(tmp_path, {"tweet": ["good"], "label": [0]}),
        "mood/train/0000.parquet": parquet(tmp_path, {"text": ["good"], "label": [0]}),
    }
    with pytest.raises(DataError, match=told):
        read(address)


def test_a_hub_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="cannot be read from the hub"):
        read("hf:ann/moods:train")
