"""The data of a run, kept: its rows as Parquet files that can be trained on again, and where they came from.

A snapshot is named after its content, so the same data gives the same folder. Its files hold the ids of posts and of
their authors, by which an erasure finds the rows; a snapshot that was erased from no longer has the hash in its name.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.errors import DataError
from train.cleaning import content_hash
from train.data import Split
from train.sources import Row, Rows, read_rows

MANIFEST = "snapshot.json"
HALVES = ("train.parquet", "validation.parquet")
_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("text", pa.string()),
        ("post_id", pa.int64()),
        ("author_id", pa.int64()),
        ("annotator", pa.string()),
    ]
)


def write_snapshot(folder: Path, split: Split, sources: Sequence[Rows], names: Sequence[str]) -> Path:
    """Keep the rows of `split` under `folder`, readable by this user alone, and return where.

    What stands there under the same hash is written again: an erasure may have taken rows out of it.
    """
    place = folder / split.snapshot
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, rows in zip(HALVES, split.rows, strict=True):
        draft = place / f".{name}.new"
        pq.write_table(_table(rows), draft)
        draft.chmod(0o600)
        draft.replace(place / name)
    manifest = {
        "sha256": split.snapshot,
        "labels": list(names),
        "sources": [{"name": one.name, "sha256": one.sha256, "rows": len(one.rows)} for one in sources],
        "rows": [len(rows) for rows in split.rows],
        "dropped": [str(finding) for finding in split.dropped],
    }
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return place


def verify(place: Path) -> str:
    """The content hash of the snapshot in `place`, computed from its rows.

    Raises:
        DataError: it cannot be read, or its rows are no longer those it was named after.
    """
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        expected, labels, counts = manifest["sha256"], manifest["labels"], manifest["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{place}: is not a snapshot ({type(error).__name__})") from None
    halves = [read_rows(place / name, labels).rows for name in HALVES]
    found = content_hash(*halves)
    if found != expected:
        gone = sum(counts) - sum(map(len, halves))
        raise DataError(f"{place}: {gone} rows are missing since it was written, by an erasure or by hand")
    return found


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}
    return pa.table(columns, schema=_SCHEMA)
