"""Erasing posts and authors from files: snapshots, results of jobs, archives.

What finds a post in a file is its id. So a file that holds posts holds their ids beside them: lines of text (.jsonl,
.ndjson, .csv, .tsv, .txt, .log) lose every line that names one of the ids, Parquet files every row whose `post_id` or
`author_id` is one of them. Files are replaced whole, so a reader sees the old one or the new one; only spools, which a
process appends to meanwhile, have their records written over where they stand.
"""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from overtone import job_files
from overtone.logging import get_logger
from overtone.spool import SUFFIX, blank_records

_LINES = frozenset({".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".log"})
_NUMBER = re.compile(rb"(?<!\d)\d{1,19}(?!\d)")
_ID_COLUMNS = ("post_id", "author_id")

_log = get_logger()


def erase_from_folder(folder: Path, post_ids: Collection[int], author_ids: Collection[int] = ()) -> int:
    """Remove what names these ids from the files under `folder`, and return how many lines and rows that was.

    Blocking; a folder that is not there holds nothing.

    Raises:
        OSError: a file can be neither read nor replaced.
    """
    numbers = frozenset(b"%d" % number for number in (*post_ids, *author_ids))
    removed = 0
    for path in sorted(folder.rglob("*")) if numbers and folder.is_dir() else ():
        if path.suffix in _LINES and path.is_file():
            removed += _erase_lines(path, numbers)
        elif path.suffix == job_files.SUFFIX and path.is_file():
            removed += _erase_job_lines(path, numbers)
        elif path.suffix == ".parquet" and path.is_file():
            removed += _erase_rows(path, frozenset((*post_ids, *author_ids)))
        elif path.suffix == SUFFIX and path.is_file():
            removed += _erase_records(path, numbers)
    return removed


def _erase_lines(path: Path, numbers: frozenset[bytes]) -> int:
    return _erase_where(path, lambda line: not numbers.isdisjoint(_NUMBER.findall(line)))


def _erase_job_lines(path: Path, numbers: frozenset[bytes]) -> int:
    try:
        return _erase_where(path, lambda line: job_files.names_one_of(line, numbers))
    except FileNotFoundError:  # classified, or deleted, in between
        return 0


def _erase_where(path: Path, is_named: Callable[[bytes], bool]) -> int:
    draft = path.with_name(f".{path.name}.erasing")
    removed = 0
    with path.open("rb") as lines, draft.open("wb") as kept:
        for line in lines:
            if is_named(line):
                removed += 1
            else:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    _replace(path, draft, removed)
    return removed


def _erase_records(path: Path, numbers: frozenset[bytes]) -> int:
    try:
        return blank_records(path, lambda payload: not numbers.isdisjoint(_NUMBER.findall(payload)))
    except FileNotFoundError:  # read to its end, and stored, in between
        return 0


def _erase_rows(path: Path, numbers: frozenset[int]) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = pa.array(sorted(numbers), pa.int64())
    draft = path.with_name(f".{path.name}.erasing")
    removed = 0
    with pq.ParquetFile(path) as source, pq.ParquetWriter(draft, source.schema_arrow) as kept:
        columns = [name for name in _ID_COLUMNS if name in source.schema_arrow.names]
        for batch in source.iter_batches():
            table = pa.Table.from_batches([batch])
            for name in columns:
                table = table.filter(pc.invert(pc.is_in(table[name], value_set=wanted)))
            removed += batch.num_rows - table.num_rows
            kept.write_table(table)
    _replace(path, draft, removed)
    return removed


def _replace(path: Path, draft: Path, removed: int) -> None:
    if not removed:
        draft.unlink()
        return
    draft.chmod(path.stat().st_mode & 0o777)
    draft.replace(path)
    _log.info("file.erased_from", file=path.name, removed=removed)
