"""Training files in folders and in a bucket, read by tasks of a real Ray."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from overtone.errors import DataError
from train.cluster import ray_cluster
from train.sources import read_rows

pytestmark = [
    pytest.mark.timeout(240),
    # Ray Data warns of settings that it makes itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NAMES = ("negative", "neutral", "positive")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(None):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.tsv").write_text("label\ttext\npositive\tfine\nneutral\tnoon\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"label": "negative", "text": "bad", "author_id": 7}\n', encoding="utf-8")
    (tmp_path / "notes.md").write_text("label text", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    pq.write_table(pa.table({"label": ["neutral"], "text": ["a train"]}), tmp_path / "deep" / "c.parquet")
    return tmp_path


def test_all_files_of_a_folder_are_one_source_in_the_order_of_their_names(folder: Path) -> None:
    found = read_rows(folder, NAMES)

    assert found.name == str(folder)
    assert [(Path(row.source).name, row.line, row.label, row.text, row.author_id) for row in found.rows] == [
        ("a.jsonl", 1, "negative", "bad", 7),
        ("b.tsv", 2, "positive", "fine", None),
        ("b.tsv", 3, "neutral", "noon", None),
        ("c.parquet", 1, "neutral", "a train", None),
    ]
    assert found.sha256 == read_rows(folder, NAMES).sha256
    assert ray.is_initialized(), "the cluster that was there has been left"


def test_flaws_are_told_by_file_and_line(folder: Path) -> None:
    (folder / "d.csv").write_bytes(b"label,text\nhappy,a\nneutral,\nneutral,\xff\xfe\nneutral,fine\n")
    with pytest.raises(DataError) as told:
        read_rows(folder, NAMES)
    lines = told.value.message.splitlines()
    assert len(lines) == 3
    assert all("d.csv: 1 row: " in line for line in lines)
    assert {line.rpartition("(")[2] for line in lines} == {"line 2)", "line 3)", "line 4)"}


def test_a_file_that_is_no_table_is_named(folder: Path) -> None:
    (folder / "e.tsv").write_text("text only\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"e\.tsv, line 1: no column label and no column text"):
        read_rows(folder, NAMES)


def test_a_folder_without_such_files(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="No input files found"):
        read_rows(tmp_path, NAMES)


def test_an_address_of_a_file(folder: Path) -> None:
    # As the command line makes a path of it.
    found = read_rows(Path(f"file://{folder}/b.tsv"), NAMES)
    assert [row.text for row in found.rows] == ["fine", "noon"]
    with pytest.raises(DataError, match=r"missing\.tsv: cannot be read"):
        read_rows(Path(f"file://{folder}/missing.tsv"), NAMES)


def test_a_bucket() -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        store = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        store.create_bucket(Bucket="texts")
        for number in range(3):
            body = f"label\ttext\nneutral\ttext {number}\n".encode()
            store.put_object(Bucket="texts", Key=f"day/{number}.tsv", Body=body)
        address = f"s3://key:secret@texts/day?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        assert [row.text for row in read_rows(Path(address), NAMES).rows] == ["text 0", "text 1", "text 2"]
    finally:
        server.stop()
