"""Builds manifests from kustomizations without `kubectl`: the part of kustomize that the folders here use.

That part is `resources`, `components` and `patches` with a `target`, which are JSON patches (RFC 6902) or
`$patch: delete`. Anything else in a kustomization is refused, so that nothing is left out in silence.
"""

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from overtone.errors import ManifestError, NotFoundError

Document = dict[str, Any]

OVERLAYS = Path(__file__).parent / "overlays"
# libyaml reads the manifests of an overlay seven times as fast; not every build of PyYAML has it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KNOWN = {"apiVersion", "kind", "resources", "components", "patches"}
_FILE = "kustomization.yaml"


def overlay_names() -> list[str]:
    """The overlays that come with the product."""
    return sorted(path.parent.name for path in OVERLAYS.glob(f"*/{_FILE}"))


def build_overlay(overlay: str) -> list[Document]:
    """The manifests of an overlay: its name, or the folder of a kustomization of one's own.

    Raises:
        ManifestError: a file cannot be read or asks for what is not supported.
        NotFoundError: there is no such overlay.
    """
    folder = OVERLAYS / overlay if overlay in overlay_names() else Path(overlay)
    if not (folder / _FILE).is_file():
        raise NotFoundError(f"{overlay}: is neither a folder with a {_FILE} nor one of {', '.join(overlay_names())}.")
    return build(folder)


def build(folder: Path) -> list[Document]:
    """The manifests that the kustomization in `folder` describes, in the order of its files.

    Raises:
        ManifestError: a file cannot be read or asks for what is not supported.
    """
    documents: list[Document] = []
    _extend(documents, folder)
    seen = set[tuple[str, str, str]]()
    for document in documents:
        if identity(document) in seen:
            raise ManifestError(f"{folder}: {'/'.join(identity(document))} is there twice.")
        seen.add(identity(document))
    return documents


def identity(document: Mapping[str, Any]) -> tuple[str, str, str]:
    """Kind, namespace (empty for none) and name."""
    metadata = document["metadata"]
    return str(document["kind"]), str(metadata.get("namespace", "")), str(metadata["name"])


def apply_patch(document: Document, operations: Iterable[Mapping[str, Any]]) -> Document:
    """`document` after the `add`, `replace` and `remove` operations of a JSON patch; the argument stays as it is.

    Raises:
        ManifestError: an operation is not one of these, or its path is not there.
    """
    changed = deepcopy(document)
    for operation in operations:
        _apply(changed, operation)
    return changed


def _extend(documents: list[Document], folder: Path) -> None:
    """Add what `folder` brings to `documents`, then change them as it says: a component changes all before it."""
    file = folder / _FILE
    kustomization = _read(file)[0]
    unknown = set(kustomization) - _KNOWN
    if unknown:
        raise ManifestError(f"{file}: {', '.join(sorted(unknown))} is not supported; see kuberay/build.py for what is.")
    for name in kustomization.get("resources", []):
        path = folder / name
        if path.is_dir():
            _extend(documents, path)
        else:
            documents += _read(path)
    for name in kustomization.get("components", []):
        _extend(documents, folder / name)
    for patch in kustomization.get("patches", []):
        _change(documents, patch, folder)


def _change(documents: list[Document], patch: Mapping[str, Any], folder: Path) -> None:
    target = patch["target"]
    chosen = [
        index
        for index, document in enumerate(documents)
        if document["kind"] == target["kind"]
        and document["metadata"]["name"] == target.get("name", identity(document)[2])
    ]
    if not chosen:
        raise ManifestError(f"{folder / _FILE}: a patch has no target: {dict(target)}")
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
    body = yaml.safe_load(text)
    is_deletion = isinstance(body, dict) and body.get("$patch") == "delete"
    if not is_deletion and not isinstance(body, list):
        raise ManifestError(f"{folder / _FILE}: a patch is neither a list of operations nor `$patch: delete`.")
    for index in reversed(chosen):
        if is_deletion:
            del documents[index]
        else:
            documents[index] = apply_patch(documents[index], body)


def _apply(document: Document, operation: Mapping[str, Any]) -> None:
    path, kind = str(operation["path"]), operation["op"]
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    place: Any = document
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if isinstance(place, list):
            _apply_to_list(place, last, kind, operation.get("value"))
            return
        if kind in {"replace", "remove"}:
            del place[last]
        if kind in {"replace", "add"}:
            place[last] = deepcopy(operation["value"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ManifestError(f"A patch cannot {kind} {path}: it is not there.") from error
    if kind not in {"add", "replace", "remove"}:
        raise ManifestError(f"{path}: `{kind}` is not one of add, replace, remove.")


def _apply_to_list(place: list[Any], last: str, kind: str, value: Any) -> None:
    if kind == "add":
        place.insert(len(place) if last == "-" else int(last), deepcopy(value))
    elif kind == "replace":
        place[int(last)] = deepcopy(value)
    else:
        del place[int(last)]


def _read(path: Path) -> list[Document]:
    try:
        # Through JSON, so that what YAML's anchors share is changed in one place alone.
        documents = yaml.load_all(path.read_text(encoding="utf-8"), _LOADER)
        return [json.loads(json.dumps(each)) for each in documents if each]
    except (OSError, yaml.YAMLError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error
