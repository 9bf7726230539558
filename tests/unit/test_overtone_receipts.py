"""Erasure receipts and erasure from files."""

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.erasure_files import erase_from_folder
from overtone.errors import ConfigurationError, DataError
from overtone.receipts import public_key, sign, signing_key, verify
from overtone.settings import load_settings

KEY = signing_key(load_settings(erasure_signing_key=base64.b64encode(b"k" * 32).decode()))
BODY: dict[str, Any] = {"kind": "post", "id": "7", "removed": {"posts": 1}, "actor": "cli:ann"}


def test_a_receipt_is_good_for_who_trusts_its_key() -> None:
    receipt = json.loads(json.dumps(sign(BODY, KEY)))
    assert verify(receipt, public_key(KEY)) == BODY


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=5))
def test_any_body_can_be_signed(body: dict[str, Any]) -> None:
    assert verify(json.loads(json.dumps(sign(body, KEY))), public_key(KEY)) == json.loads(json.dumps(body))


def test_a_receipt_that_was_changed_is_refused() -> None:
    receipt = sign(BODY, KEY)
    with pytest.raises(DataError, match="was changed"):
        verify({**receipt, "body": {**BODY, "id": "8"}}, public_key(KEY))


def test_a_receipt_of_another_key_is_refused(tmp_path: Path) -> None:
    other = signing_key(load_settings(overtone_home=tmp_path))
    with pytest.raises(DataError, match="another key"):
        verify(sign(BODY, KEY), public_key(other))


@pytest.mark.parametrize("value", [None, [], {}, {"body": {}}, {**sign(BODY, KEY), "signature": "?"}, "x"])
def test_what_is_no_receipt_is_refused(value: Any) -> None:
    with pytest.raises(DataError):
        verify(value, public_key(KEY))


def test_a_key_is_made_once_and_kept_to_its_owner(tmp_path: Path) -> None:
    settings = load_settings(overtone_home=tmp_path / "home")
    assert public_key(signing_key(settings)) == public_key(signing_key(settings))
    assert stat.S_IMODE((tmp_path / "home" / "erasure_key").stat().st_mode) == 0o600


def test_a_bad_key_is_named_and_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="ERASURE_SIGNING_KEY") as refused:
        signing_key(load_settings(erasure_signing_key="hunter2"))
    assert "hunter2" not in refused.value.message


def test_lines_that_name_an_id_go(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_bytes(b'{"post_id": "12", "t": "\xff"}\n{"post_id": 123}\n{"author_id": 9}\n')
    (folder / "rows.csv").write_text("post_id,text\n12,hello\n13,12.\n")
    (folder / "other.bin").write_bytes(b"12\n")
    before = (folder / "other.bin").stat()
    assert erase_from_folder(tmp_path, [12], [9]) == 4
    assert (folder / "rows.jsonl").read_bytes() == b'{"post_id": 123}\n'
    assert (folder / "rows.csv").read_text() == "post_id,text\n"
    assert (folder / "other.bin").stat() == before
    assert erase_from_folder(tmp_path, [12], [9]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["other.bin", "rows.csv", "rows.jsonl"]


def test_rows_of_parquet_go(tmp_path: Path) -> None:
    path = tmp_path / "month.parquet"
    table = pa.table({"post_id": [1, 2, 3, 4], "author_id": [7, 8, 7, 9], "text": ["a", "b", "c", "d"]})
    pq.write_table(table, path)
    assert erase_from_folder(tmp_path, [4], [7]) == 3
    assert pq.read_table(path).to_pylist() == [{"post_id": 2, "author_id": 8, "text": "b"}]
    assert erase_from_folder(tmp_path, [4], [7]) == 0


def test_no_folder_and_no_ids_need_no_work(tmp_path: Path) -> None:
    assert erase_from_folder(tmp_path / "gone", [1]) == 0
    assert erase_from_folder(tmp_path, []) == 0
