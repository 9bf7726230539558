"""The bundle: the folder that holds one trained model and all that is needed to use it rightly.

    model.onnx       logits [n, labels] from padded token ids
    tokenizer.json   fast tokenizer, without padding or truncation of its own
    bundle.json      labels, limits, temperature, golden texts, metrics and the sha256 of the other files
    torch/           the model as plain tensors, where it was exported with them (see `overtone.torch_form`)

A bundle either loads whole, with every hash and number checked, or not at all. This module reads and writes bundles and
turns texts into token ids and logits into predictions; it runs no model (see `overtone.engine`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overtone.errors import BundleError
from overtone.schema import Prediction
from overtone.text import TEXT_VERSION, depends_on_neighbours, normalise, storable
from overtone.torch_form import TORCH_CONFIG_FILE, TORCH_FILES, TORCH_WEIGHTS_FILE, TorchForm, read_torch_form
from overtone.words import WordEncoder, frame_of

FORMAT = 1
DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "default"
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "bundle.json"

Precision = Literal["int8", "fp32", "fp16"]

_HASHED_FILES = (MODEL_FILE, TOKENIZER_FILE)

_CHARS_A_TOKEN = 64
"""Characters of a text that are looked at for each token there is room for; words of English have about five."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A text and the scores, one a label, that the bundle must give it."""

    text: str
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BundleSpec:
    """What a new bundle is made from, beside its files."""

    name: str
    labels: tuple[str, ...]
    max_length: int
    """Longest text, in tokens, special tokens included."""
    temperature: float
    """Logits are divided by it before the softmax."""
    precision: Precision
    golden: tuple[Golden, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    base_model: str = ""
    license: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files were checked when it was opened."""

    path: Path
    name: str
    version: str
    labels: tuple[str, ...]
    max_length: int
    text_version: int
    temperature: float
    precision: Precision
    golden: tuple[Golden, ...]
    metrics: Mapping[str, Any]
    base_model: str
    created_at: datetime
    license: str
    sha256: Mapping[str, str]
    torch: TorchForm | None = None
    """None without the files of `TORCH_FILES`."""

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the bundle, as paths below its folder."""
        return (*_hashed_files(self.sha256), MANIFEST_FILE)

    @property
    def spec(self) -> BundleSpec:
        """What it was made from."""
        return BundleSpec(
            name=self.name,
            labels=self.labels,
            max_length=self.max_length,
            temperature=self.temperature,
            precision=self.precision,
            golden=self.golden,
            metrics=self.metrics,
            base_model=self.base_model,
            license=self.license,
        )

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL_FILE

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer file."""
        return self.path / TOKENIZER_FILE

    @property
    def torch_weights_path(self) -> Path:
        """The file of tensors; there only if `torch` is."""
        return self.path / TORCH_WEIGHTS_FILE


class _GoldenEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(min_length=1)]
    scores: tuple[Annotated[float, Field(ge=0, le=1)], ...]


class _Manifest(BaseModel):
    """`bundle.json`, field by field."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    version: str
    labels: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    max_length: Annotated[int, Field(ge=3, le=8192)]
    text_version: int
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    precision: Precision
    golden: Annotated[tuple[_GoldenEntry, ...], Field(min_length=1)]
    metrics: dict[str, Any] = {}
    base_model: str = ""
    created_at: datetime
    license: str = ""
    sha256: dict[str, str]


def load_bundle(path: Path | None = None) -> Bundle:
    """Open the bundle at `path` (default: the one in the package) and check all of it.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    folder = (path or DEFAULT_BUNDLE).absolute()
    if not folder.is_dir():
        raise BundleError(f"{folder}: there is no such folder; a bundle is a folder with {MANIFEST_FILE} in it")
    _require_files(folder, (MANIFEST_FILE, *_HASHED_FILES))
    manifest = _read_manifest(folder / MANIFEST_FILE)
    _check_manifest(folder / MANIFEST_FILE, manifest)
    names = _hashed_files(manifest.sha256)
    _require_files(folder, names)
    for name in names:
        if _sha256(folder / name) != manifest.sha256[name]:
            raise BundleError(f"{folder / name}: its sha256 is not the one in {MANIFEST_FILE}; copy the bundle again")
    return _opened(folder, manifest)


def write_bundle(folder: Path, *, spec: BundleSpec) -> Bundle:
    """Write `bundle.json` for the model, the tokenizer and, if any, the torch form that are in `folder` already.

    Opens the bundle.

    Raises:
        BundleError: a file is missing or `spec` does not describe a bundle that would load.
    """
    has_torch = any((folder / name).is_file() for name in TORCH_FILES)
    names = (*_HASHED_FILES, *TORCH_FILES) if has_torch else _HASHED_FILES
    _require_files(folder, names)
    sha256 = {name: _sha256(folder / name) for name in names}
    content = {
        "format": FORMAT,
        "name": spec.name,
        "labels": list(spec.labels),
        "max_length": spec.max_length,
        "text_version": TEXT_VERSION,
        "temperature": spec.temperature,
        "precision": spec.precision,
        "golden": [{"text": golden.text, "scores": list(golden.scores)} for golden in spec.golden],
        "metrics": dict(spec.metrics),
        "base_model": spec.base_model,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "license": spec.license,
        "sha256": sha256,
    }
    content["version"] = _version(content)
    path = folder / MANIFEST_FILE
    _check_manifest(path, _parse(path, content))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return load_bundle(folder)


class TextEncoder:
    """Texts to token ids, as the bundle's model learned them. Threads may share one."""

    def __init__(self, bundle: Bundle) -> None:
        """Open the tokenizer of `bundle`.

        Raises:
            BundleError: the tokenizer file cannot be read.
        """
        # Slow to import beside the rest of this module, and not needed to look at a bundle.
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
        except Exception as error:
            raise BundleError(f"{bundle.tokenizer_path}: not a tokenizer file ({error})") from error
        # Set once: changing a tokenizer while another thread encodes with it is an error in `tokenizers`.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(bundle.max_length)
        frame = frame_of(self._tokenizer)
        self._words = WordEncoder(normalise, self._ids_of_word, frame, depends_on_neighbours) if frame else None
        self._max_chars = bundle.max_length * _CHARS_A_TOKEN
        self.max_length = bundle.max_length
        """Most tokens a row, special tokens included."""
        self.special_tokens: int = self._tokenizer.num_special_tokens_to_add(False)
        """Tokens of each row that stand for no text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, at most `max_length` of the bundle; not padded.

        Half a surrogate pair counts as an unknown character.
        """
        texts = [text[: self._max_chars] for text in texts]
        if self._words is None:
            return [encoding.ids for encoding in self._encodings(texts)]
        rows = [self._words.ids(text, self.max_length) for text in texts]
        return [self._encodings([text])[0].ids if row is None else row for text, row in zip(texts, rows, strict=True)]

    def windows(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """The ids of each text in rows that `encode` could have given: nothing is left out, nothing is in two rows.

        A text has at least one row, and more than one only if it holds more than `max_length` tokens.
        """
        # What truncation cuts off, the tokenizer hands out in rows of the same length.
        return [[item.ids for item in (first, *first.overflowing)] for first in self._encodings(texts)]

    def count(self, text: str) -> int:
        """The tokens of the whole of `text`, special tokens included."""
        (rows,) = self.windows([text])
        return sum(len(ids) - self.special_tokens for ids in rows) + self.special_tokens

    def _ids_of_word(self, word: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        except TypeError:
            ids = self._tokenizer.encode(storable(word), add_special_tokens=False).ids
        return ids

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        prepared = [normalise(text) for text in texts]
        try:
            encodings: list[Any] = self._tokenizer.encode_batch_fast(prepared)
        except TypeError:
            encodings = self._tokenizer.encode_batch_fast([storable(text) for text in prepared])
        return encodings


def probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Calibrated probabilities, float32 [n, labels], of logits, float32 [n, labels]."""
    scaled = logits / np.float32(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def to_prediction(bundle: Bundle, row: NDArray[np.float32]) -> Prediction:
    """The prediction that the scores `row`, float32 [labels], stand for."""
    scores: list[float] = row.tolist()
    best = scores.index(max(scores))
    return Prediction(
        label=bundle.labels[best],
        confidence=scores[best],
        scores=dict(zip(bundle.labels, scores, strict=True)),
        model_version=bundle.version,
    )


def _require_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name}: the file is missing")


def _hashed_files(sha256: Mapping[str, str]) -> tuple[str, ...]:
    """The files of a bundle that `sha256` has an entry for, but for the manifest."""
    return tuple(name for name in (*_HASHED_FILES, *TORCH_FILES) if name in sha256)


def _read_manifest(path: Path) -> _Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: must hold a JSON object")
    # Before the other fields: a later format may not have them.
    if content.get("format") != FORMAT:
        raise BundleError(f"{path}: format is {content.get('format')!r}, this version reads format {FORMAT}")
    return _parse(path, content)


def _parse(path: Path, content: Mapping[str, Any]) -> _Manifest:
    try:
        return _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}") from error


def _check_manifest(path: Path, manifest: _Manifest) -> None:
    """The rules that tie fields to each other and to this version of the code."""
    if manifest.text_version != TEXT_VERSION:
        raise BundleError(
            f"{path}: text_version is {manifest.text_version}, this version normalises texts by rules {TEXT_VERSION}; "
            "train the bundle again or run the version it was made with"
        )
    if len(set(manifest.labels)) != len(manifest.labels):
        raise BundleError(f"{path}: labels: a label is named twice")
    for number, golden in enumerate(manifest.golden):
        if len(golden.scores) != len(manifest.labels):
            raise BundleError(
                f"{path}: golden.{number}.scores has {len(golden.scores)} numbers for {len(manifest.labels)} labels"
            )
        if abs(sum(golden.scores) - 1) > 1e-2:
            raise BundleError(f"{path}: golden.{number}.scores add up to {sum(golden.scores):.4f}, not 1")
    has_torch = any(name in manifest.sha256 for name in TORCH_FILES)
    for name in (*_HASHED_FILES, *TORCH_FILES) if has_torch else _HASHED_FILES:
        if name not in manifest.sha256:
            raise BundleError(f"{path}: sha256 has no entry for {name}")
    expected = _version(manifest.model_dump())
    if manifest.version != expected:
        raise BundleError(f"{path}: version is {manifest.version!r}, but its contents are those of {expected!r}")


def _version(content: Mapping[str, Any]) -> str:
    """The name and a digest of everything in `content` that changes predictions."""
    relevant = {
        "sha256": {name: content["sha256"][name] for name in _hashed_files(content["sha256"])},
        "labels": list(content["labels"]),
        "max_length": content["max_length"],
        "text_version": content["text_version"],
        "temperature": float(content["temperature"]),
    }
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    return f"{content['name']}-{digest[:8]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(folder: Path, manifest: _Manifest) -> Bundle:
    torch = None
    if TORCH_CONFIG_FILE in manifest.sha256:
        texts, labels = len(manifest.golden), len(manifest.labels)
        torch = read_torch_form(folder / TORCH_CONFIG_FILE, texts=texts, labels=labels)
    return Bundle(
        path=folder,
        name=manifest.name,
        version=manifest.version,
        labels=manifest.labels,
        max_length=manifest.max_length,
        text_version=manifest.text_version,
        temperature=manifest.temperature,
        precision=manifest.precision,
        golden=tuple(Golden(entry.text, entry.scores) for entry in manifest.golden),
        metrics=manifest.metrics,
        base_model=manifest.base_model,
        created_at=manifest.created_at,
        license=manifest.license,
        sha256=manifest.sha256,
        torch=torch,
    )
