"""Training files that are not one local file: folders, and addresses such as s3://…, read through Ray Data.

Every file is read and parsed by a task of the cluster, whole, so that what is wrong with its rows is told by line.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from overtone.errors import DataError

Parsed = TypeVar("Parsed")

_SCHEME = re.compile(r"^([a-z][a-z0-9+]+):/+")


def is_remote(path: Path) -> bool:
    """Whether `path` is a folder, or an address that was written as a path."""
    return path.is_dir() or _SCHEME.match(str(path)) is not None


def read_files(
    place: Path, suffixes: Sequence[str], parse: Callable[[Path, bytes], Iterable[Parsed]]
) -> list[tuple[str, list[Parsed]]]:
    """The name of each file at `place` that ends in one of `suffixes`, and what `parse` makes of it, by name.

    Works on the cluster that this process is connected to, or on one of its own.

    Raises:
        DataError: `place` cannot be read or has no such file, or `parse` raised one.
    """
    address = _address(place)
    import ray.data
    from ray.exceptions import RayError

    from train.cluster import quiet_data_context, ray_cluster

    def read(file: dict[str, Any]) -> dict[str, Any]:
        name = file["path"]
        try:
            return {"name": name, "error": "", "found": pickle.dumps(list(parse(Path(name), file["bytes"])))}
        except DataError as error:
            return {"name": name, "error": error.message, "found": b""}

    extensions = [suffix.removeprefix(".") for suffix in suffixes]
    with ray_cluster(None):
        quiet_data_context()
        try:
            files = ray.data.read_binary_files(address, include_paths=True, file_extensions=extensions)
            found = files.map(read).take_all()
        except (OSError, ValueError, RayError) as error:
            said = str(getattr(error, "cause", None) or error).strip().splitlines()
            raise DataError(f"{address}: cannot be read ({said[-1] if said else type(error).__name__})") from None
    found.sort(key=lambda one: one["name"])
    for one in found:
        if one["error"]:
            raise DataError(one["error"])
    return [(one["name"], pickle.loads(one["found"])) for one in found]  # made by `read` above


def _address(place: Path) -> str:
    # A path has one slash where an address has two.
    scheme = _SCHEME.match(str(place))
    if scheme and scheme[1] == "file":
        return str(place)[scheme.end() - 1 :]
    return _SCHEME.sub(r"\1://", str(place))
