"""Backups: one encrypted archive of the database and of the home's files, and the way back.

An archive is a tar file, compressed, cut into chunks of 1 MiB, each sealed by AES-256-GCM with its number and whether
it is the last, so that chunks that are changed, moved or cut off are noticed. Beside it a JSON file says when it was
made and its SHA-256; it is written last, so that what is listed is whole.
"""

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import asyncpg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from overtone.db.database import asyncpg_dsn, connection_errors
from overtone.db.embedded import find_binaries
from overtone.errors import ConfigurationError, DataError, EnvironmentProblemError, NotFoundError

_MAGIC = b"OVERTONE-BACKUP-1\n"
_PREFIX_BYTES = 7
_CHUNK = 1 << 20
_TAG_BYTES = 16
_KEY_BYTES = 32
_SUFFIX = ".backup"
KEPT_FOLDERS = ("bundles", "mlflow")
"""Folders of the home that a backup holds: registered bundles, and the local registry."""
KEPT_FILES = ("api_key", "erasure_key")


@dataclass(frozen=True, slots=True)
class Backup:
    """What is told about a backup without opening it."""

    name: str
    created_at: str
    bytes: int
    sha256: str
    rows: dict[str, int]


def read_key(file: Path, *, make: bool = False) -> bytes:
    """The 32 bytes of key in `file`, as hexadecimal digits; with `make`, a new one where there is no file.

    Raises:
        ConfigurationError: the file is not there or holds no key.
    """
    if make and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(_KEY_BYTES) + "\n")
    try:
        key = bytes.fromhex(file.read_text().strip())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: no backup key can be read there.") from error
    if len(key) != _KEY_BYTES:
        raise ConfigurationError(f"{file}: a backup key has {_KEY_BYTES} bytes.")
    return key


def create(url: str, home: Path, target: str, key: bytes) -> Backup:
    """Put a backup of the database at `url` and of `home` into the folder `target`, a path or an fsspec address.

    Raises:
        EnvironmentProblemError: PostgreSQL's programs are missing or fail.
    """
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="overtone-backup-") as scratch:
        folder = Path(scratch)
        rows = asyncio.run(_dump(url, folder / "database.sql"))
        packed, sealed = folder / "packed.tgz", folder / "sealed"
        with tarfile.open(packed, "w:gz", compresslevel=3) as archive:
            archive.add(folder / "database.sql", "database.sql")
            for name in (*KEPT_FOLDERS, *KEPT_FILES):
                if (home / name).exists():
                    archive.add(home / name, f"home/{name}")
        with packed.open("rb") as plain, sealed.open("wb") as out:
            _seal(plain, out, key)
        name = f"overtone-{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        made = Backup(name, now.isoformat(timespec="seconds"), sealed.stat().st_size, _digest(sealed), rows)
        files, root = _files(target)
        files.makedirs(root, exist_ok=True)
        files.put_file(str(sealed), f"{root}/{name}{_SUFFIX}")
        files.pipe_file(f"{root}/{name}.json", json.dumps(asdict(made)).encode())
    return made


def found(target: str) -> list[Backup]:
    """The backups in `target`, the oldest first."""
    files, root = _files(target)
    if not files.exists(root):
        return []
    return [Backup(**json.loads(files.cat_file(path))) for path in sorted(files.glob(f"{root}/overtone-*.json"))]


def verify(target: str, name: str, key: bytes) -> Backup:
    """Read the backup `name` whole and check it; `name` may be `latest`.

    Raises:
        NotFoundError: there is no such backup.
        DataError: it is damaged, or made with another key.
    """
    with tempfile.TemporaryDirectory(prefix="overtone-backup-") as scratch:
        return _unpack(target, name, key, Path(scratch))


def restore(url: str, home: Path, target: str, name: str, key: bytes) -> Backup:
    """Replace the tables of `url` and the kept files of `home` by those of the backup `name`.

    The database changes in one transaction; before anything changes the backup is checked whole.

    Raises:
        NotFoundError: there is no such backup.
        DataError: it is damaged, made with another key, or not what came back.
        EnvironmentProblemError: PostgreSQL's programs are missing or fail; the tables are as they were.
    """
    with tempfile.TemporaryDirectory(prefix="overtone-backup-") as scratch:
        folder = Path(scratch)
        backup = _unpack(target, name, key, folder)
        drop = ["-c", "DROP SCHEMA IF EXISTS overtone CASCADE"]
        _client("psql", url, "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", *drop, "-f", str(folder / "database.sql"))
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for kept in (folder / "home").iterdir() if (folder / "home").is_dir() else ():
            if kept.is_dir():
                shutil.rmtree(home / kept.name, ignore_errors=True)
            shutil.move(kept, home / kept.name)
    if (rows := asyncio.run(_count(url))) != backup.rows:
        wrong = sorted(table for table in backup.rows | rows if backup.rows.get(table) != rows.get(table))
        raise DataError(f"The row counts of {', '.join(wrong)} are not those of the backup.")
    return backup


def _unpack(target: str, name: str, key: bytes, folder: Path) -> Backup:
    listed = found(target)
    matching = listed[-1:] if name == "latest" else [one for one in listed if one.name == name]
    if not matching:
        raise NotFoundError("There is no such backup; `overtone backup list` shows those there are.")
    backup = matching[0]
    files, root = _files(target)
    files.get_file(f"{root}/{backup.name}{_SUFFIX}", str(folder / "sealed"))
    if _digest(folder / "sealed") != backup.sha256:
        raise DataError(f"{backup.name}: damaged; its SHA-256 is not the one it was made with.")
    with (folder / "sealed").open("rb") as sealed, (folder / "packed.tgz").open("wb") as plain:
        for chunk in _opened(sealed, key):
            plain.write(chunk)
    with tarfile.open(folder / "packed.tgz") as archive:
        archive.extractall(folder, filter="data")
    return backup


def _seal(plain: BinaryIO, out: BinaryIO, key: bytes) -> None:
    prefix, cipher = secrets.token_bytes(_PREFIX_BYTES), AESGCM(key)
    out.write(_MAGIC + prefix)
    number, chunk = 0, plain.read(_CHUNK)
    while True:
        following = plain.read(_CHUNK)
        out.write(cipher.encrypt(_nonce(prefix, number, is_last=not following), chunk, _MAGIC))
        if not following:
            return
        number, chunk = number + 1, following


def _opened(sealed: BinaryIO, key: bytes) -> Iterator[bytes]:
    if sealed.read(len(_MAGIC)) != _MAGIC:
        raise DataError("The file is no backup of this version.")
    prefix, cipher = sealed.read(_PREFIX_BYTES), AESGCM(key)
    number, chunk = 0, sealed.read(_CHUNK + _TAG_BYTES)
    while True:
        following = sealed.read(_CHUNK + _TAG_BYTES)
        try:
            yield cipher.decrypt(_nonce(prefix, number, is_last=not following), chunk, _MAGIC)
        except (InvalidTag, ValueError) as error:
            raise DataError("The backup is damaged, or was made with another key.") from error
        if not following:
            return
        number, chunk = number + 1, following


def _nonce(prefix: bytes, number: int, *, is_last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + bytes([is_last])


async def _dump(url: str, file: Path) -> dict[str, int]:
    with connection_errors():
        connection = await asyncpg.connect(asyncpg_dsn(url))
    try:
        # The counts and the dump see the same moment.
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            snapshot = await connection.fetchval("SELECT pg_export_snapshot()")
            rows = await _rows(connection)
            options = ["--schema=overtone", "--no-owner", "--no-privileges", f"--snapshot={snapshot}", f"--file={file}"]
            await asyncio.to_thread(_client, "pg_dump", url, *options)
            return rows
    finally:
        await connection.close()


async def _count(url: str) -> dict[str, int]:
    with connection_errors():
        connection = await asyncpg.connect(asyncpg_dsn(url))
    try:
        return await _rows(connection)
    finally:
        await connection.close()


async def _rows(connection: Any) -> dict[str, int]:
    tables = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('overtone') AND relkind IN ('r', 'p')"
        " AND NOT relispartition ORDER BY 1"
    )
    return {name: await connection.fetchval(f'SELECT count(*) FROM overtone."{name}"') for (name,) in tables}


def _client(program: str, url: str, *options: str) -> None:
    """Run a program of PostgreSQL on `url`; the password goes by the environment, where other users cannot see it."""
    dsn = asyncpg_dsn(url)
    parts = urlsplit(dsn)
    environment = {"PGPASSWORD": unquote(parts.password)} if parts.password else {}
    if parts.password:
        user, host = parts.netloc.rpartition("@")[0].split(":", 1)[0], parts.netloc.rpartition("@")[2]
        dsn = parts._replace(netloc=f"{user}@{host}").geturl()
    command = [str(find_binaries() / program), "-d", dsn, *options]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        # psql quotes the statement and the row that failed, which may hold posts; the first line does not.
        said = done.stderr.decode(errors="replace").splitlines()[:1]
        raise EnvironmentProblemError(f"{program} failed (exit status {done.returncode}): {' '.join(said)[:300]}")


def _files(target: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise EnvironmentProblemError("Backups need fsspec: run `pip install 'overtone[archive]'`.") from error
    files, root = url_to_fs(target)
    return files, str(root).rstrip("/")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
