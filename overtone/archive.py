"""Archives of months that are dropped: Parquet files on a disk or, through fsspec, in S3 or Google Cloud Storage."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from overtone.errors import ConfigurationError, EnvironmentProblemError

_BATCH = "zstd"


class ParquetArchive:
    """One Parquet file a partition, `PARTITION.parquet`, under a folder or an fsspec address such as `s3://bucket/path`."""

    def __init__(self, address: str) -> None:
        """Raises EnvironmentProblemError if what it needs is not installed, ConfigurationError for a wrong address."""
        try:
            import fsspec
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise EnvironmentProblemError(
                "Archiving needs pyarrow and fsspec: pip install 'overtone[archive]'."
            ) from error
        try:
            self._files, self._folder = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"ARCHIVE_URL: {address.partition('://')[0]} cannot be used ({error})") from error

    async def keep(self, name: str, rows: AsyncIterator[list[dict[str, Any]]]) -> int:
        """Write all `rows` and return how many. The file has its name only when it is whole; no rows leave no file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        await asyncio.to_thread(self._files.makedirs, self._folder, exist_ok=True)
        final, draft = f"{self._folder}/{name}.parquet", f"{self._folder}/.{name}.part"
        count, writer = 0, None
        with self._files.open(draft, "wb") as file:
            async for page in rows:
                table = pa.Table.from_pylist([_plain(row) for row in page], schema=_schema(page[0]))
                writer = writer or pq.ParquetWriter(file, table.schema, compression=_BATCH)
                await asyncio.to_thread(writer.write_table, table)
                count += len(page)
            if writer is not None:
                writer.close()
        if count:
            await asyncio.to_thread(self._files.mv, draft, final)
        else:
            await asyncio.to_thread(self._files.rm, draft)
            if await asyncio.to_thread(self._files.exists, final):
                await asyncio.to_thread(self._files.rm, final)
        return count


def _schema(row: dict[str, Any]) -> Any:
    import pyarrow as pa

    types = {
        "post_id": pa.int64(),
        "author_id": pa.int64(),
        "confidence": pa.float32(),
        "rule_tags": pa.list_(pa.string()),
    }
    instant = pa.timestamp("us", tz="UTC")
    return pa.schema(
        [
            (name, types.get(name, instant if isinstance(value, datetime) else pa.string()))
            for name, value in row.items()
        ]
    )


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()}
