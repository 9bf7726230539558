"""Labelled texts of a data set on the Hugging Face hub: of the Parquet files that the hub makes of every public one."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from overtone.errors import DataError, EnvironmentProblemError

PREFIX = "hf:"

Found = tuple[int, Mapping[str, Any] | str]
"""The number or line of a row, and its values by column or what is wrong with it."""

_REVISION = "refs/convert/parquet"
_FILE = re.compile(r"(?P<config>[^/]+)/(?P<split>[^/]+)/\d+\.parquet")
_WRITTEN = f"{PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIG:SPLIT, such as {PREFIX}cardiffnlp/tweet_eval:sentiment:train"
_REQUIRED = ("label", "text")
_COLUMNS = (*_REQUIRED, "post_id", "author_id", "annotator")


def hub_rows(address: str) -> Iterator[Found]:
    """The rows at `address`, each with its number and its columns, or with what is wrong with it.

    A label that the data set keeps as a number is told by its name.

    Raises:
        DataError: the address is malformed, the hub does not answer or has no such data set, configuration or split, or
            it has no columns `label` and `text`.
        EnvironmentProblemError: the package `huggingface_hub` is not installed.
    """
    number = 0
    for file in _download(address):
        schema = pq.read_schema(file)
        absent = [column for column in _REQUIRED if column not in schema.names]
        if absent:
            raise DataError(f"{address}: no column {' and no column '.join(absent)}")
        names = _label_names(schema.metadata or {})
        known = [name for name in _COLUMNS if name in schema.names]
        for row in pq.read_table(file, columns=known).to_pylist():
            number += 1
            label = _in_words(row["label"], names)
            is_whole = isinstance(label, str) and isinstance(row["text"], str)
            yield number, {**row, "label": label} if is_whole else "the label or the text is not a string"


def _download(address: str) -> list[str]:
    """The files of the split, in the order of their rows; those of an earlier call are not fetched again."""
    name, config, split = _parts(address)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise EnvironmentProblemError(f"{error.name} is not installed; pip install 'overtone[train]'") from None
    disable_progress_bars()
    hub = HfApi()
    try:
        listed = hub.list_repo_files(name, repo_type="dataset", revision=_REVISION)
        wanted = _choose(address, listed, config, split)
        return [hub.hf_hub_download(name, one, repo_type="dataset", revision=_REVISION) for one in wanted]
    except DataError:
        raise
    except Exception as error:  # of the network, the hub, or the name
        lines = str(error).strip().splitlines()
        raise DataError(
            f"{address}: cannot be read from the hub ({lines[0] if lines else type(error).__name__})"
        ) from None


def _parts(address: str) -> tuple[str, str | None, str]:
    parts = address.removeprefix(PREFIX).split(":")
    if len(parts) not in {2, 3} or not all(parts):
        raise DataError(f"{address}: write a data set as {_WRITTEN}")
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def _choose(address: str, listed: Sequence[str], config: str | None, split: str) -> list[str]:
    files = [(found["config"], found["split"], one) for one in listed if (found := _FILE.fullmatch(one))]
    configs = sorted({one for one, _, _ in files})
    if config is None and len(configs) > 1:
        raise DataError(f"{address}: name one of its configurations: {', '.join(configs)}")
    chosen = config or "".join(configs)
    wanted = sorted(file for one, part, file in files if (one, part) == (chosen, split))
    if not wanted:
        there = sorted({f"{one}:{part}" for one, part, _ in files})
        raise DataError(f"{address}: there is no such split; there is {', '.join(there) or 'nothing'}")
    return wanted


def _label_names(metadata: Mapping[bytes, bytes]) -> list[str]:
    """What the numbers of the column `label` stand for; empty where they are not classes."""
    try:
        label = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
        return list(label["names"]) if label["_type"] == "ClassLabel" else []
    except (KeyError, ValueError, TypeError):
        return []


def _in_words(label: Any, names: Sequence[str]) -> Any:
    if names and isinstance(label, int):
        return names[label] if 0 <= label < len(names) else None
    return label
