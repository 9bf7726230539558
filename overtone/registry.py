"""The registry: bundles as versions of one MLflow model, and which of them is champion, challenger or previous.

Versions are kept by the server that `MLFLOW_TRACKING_URI` names, or else in `OVERTONE_HOME/mlflow`: a SQLite file and a
folder. A version is an MLflow `pyfunc` model that holds the bundle's folder, so MLflow can serve it too.
"""

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from overtone.bundle import Bundle, load_bundle
from overtone.errors import EnvironmentProblemError, NotFoundError, UnavailableError
from overtone.settings import Settings, set_default_environment

Alias = Literal["champion", "challenger", "previous"]
ALIASES: tuple[Alias, ...] = ("champion", "challenger", "previous")

BUNDLE_TAG = "bundle_version"
BUNDLE_FOLDER = "bundle"
"""Name of the bundle's folder among the artifacts of a version."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A version in the registry."""

    version: str
    """A whole number, as MLflow counts."""
    bundle_version: str
    run_id: str
    """Of the run that made it; empty if there was none."""
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A bundle that was fetched from the registry, in a folder that is named after its version."""

    folder: Path
    bytes: int


def local_store(home: Path) -> Path:
    """The folder of the registry of `home`, for when no server is named."""
    return home / "mlflow"


def tracking_uri(settings: Settings) -> str:
    """The server that `MLFLOW_TRACKING_URI` names, or the SQLite file of the home."""
    return settings.mlflow_tracking_uri or f"sqlite:///{local_store(settings.home) / 'mlflow.db'}"


def artifact_location(settings: Settings) -> str | None:
    """Where artifacts of a new experiment go, if that is for this process to say."""
    return None if settings.mlflow_tracking_uri else (local_store(settings.home) / "artifacts").as_uri()


def is_in_use(settings: Settings) -> bool:
    """Whether there is a registry: a server is named, or a run was recorded in the home."""
    return bool(settings.mlflow_tracking_uri) or (local_store(settings.home) / "mlflow.db").is_file()


def import_mlflow() -> Any:
    """The module `mlflow`.

    Raises:
        EnvironmentProblemError: it is not installed.
    """
    set_default_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false", MLFLOW_LOGGING_LEVEL="WARNING")
    try:
        import mlflow
    except ImportError as error:
        raise EnvironmentProblemError(f"{error.name} is not installed; pip install 'overtone[registry]'") from None
    return mlflow


@contextmanager
def mlflow_errors(what: str) -> Iterator[None]:
    """Tell a failure of MLflow as one of ours: `what` is what was tried.

    Raises:
        UnavailableError: MLflow failed.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        lines = str(error).strip().splitlines()
        raise UnavailableError(f"MLflow: {what} failed: {lines[0] if lines else type(error).__name__}") from error


class Registry:
    """The versions of the model `MLFLOW_MODEL_NAME`. Blocks; every call may raise `UnavailableError`."""

    def __init__(self, settings: Settings, *, bundles: Path | None = None) -> None:
        """Open the registry; `bundles` is where fetched bundles go [default: `OVERTONE_HOME/bundles`].

        Raises:
            EnvironmentProblemError: MLflow is not installed.
        """
        self._mlflow = import_mlflow()
        self._uri = tracking_uri(settings)
        self._bundles = bundles or settings.home / "bundles"
        self.name = settings.mlflow_model_name
        if not settings.mlflow_tracking_uri:
            local_store(settings.home).mkdir(parents=True, exist_ok=True, mode=0o700)
        # Parts of MLflow open the store it is set to, whatever they are told, and make one in the working directory.
        self._mlflow.set_tracking_uri(self._uri)
        self._mlflow.set_registry_uri(self._uri)
        self._client = self._mlflow.MlflowClient(self._uri, self._uri)

    def resolve(self, name: str) -> Registered:
        """The version that `name` means: an alias, a number, or the version of a bundle.

        Raises:
            NotFoundError: there is none.
        """
        for one in self.history():
            if name in (one.version, one.bundle_version) or name in one.aliases:
                return one
        raise NotFoundError(f"The registry {self.name} has no version {name}.")

    def find(self, name: str) -> Registered | None:
        """As `resolve`; None if there is none."""
        try:
            return self.resolve(name)
        except NotFoundError:
            return None

    def history(self) -> list[Registered]:
        """All versions, the newest first."""
        with mlflow_errors("listing versions"):
            found = list(self._client.search_model_versions(f"name='{self.name}'"))
            model = self._client.get_registered_model(self.name) if found else None
        aliases = model.aliases if model else {}
        versions = [
            Registered(
                version=str(one.version),
                bundle_version=one.tags.get(BUNDLE_TAG, ""),
                run_id=one.run_id or "",
                aliases=tuple(alias for alias, version in aliases.items() if str(version) == str(one.version)),
                tags=dict(one.tags),
            )
            for one in found
        ]
        return sorted(versions, key=lambda one: int(one.version), reverse=True)

    def folder_of(self, wanted: Registered) -> Path:
        """Where `fetch` puts the bundle of `wanted`: a folder that is named after its version."""
        return self._bundles / (wanted.bundle_version or f"{self.name}-{wanted.version}")

    def fetch(self, wanted: Registered) -> Bundle:
        """The bundle of `wanted`, in the folder `folder_of` says.

        Raises:
            BundleError: what the registry holds is not a bundle that loads.
        """
        target = self.folder_of(wanted)
        if not target.is_dir():
            self._bundles.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self._bundles) as scratch:
                source = f"models:/{self.name}/{wanted.version}/artifacts/{BUNDLE_FOLDER}"
                with mlflow_errors(f"fetching version {wanted.version}"):
                    found = Path(self._download(source, scratch))
                load_bundle(found)
                _move(found, target)
        return load_bundle(target)

    def prune(self, keep: int, used: Collection[Path], *, is_dry_run: bool = False) -> list[Fetched]:
        """Remove fetched bundles, which can be fetched again; what was, or would be, removed, the oldest last.

        Those stay that have an alias or are in one of the folders `used`, and of the rest the `keep` fetched last.
        Folders that are no version of the registry are not touched.
        """
        versions: dict[Path, list[Registered]] = defaultdict(list)
        for one in self.history():
            versions[self.folder_of(one)].append(one)
        in_use = {folder.resolve() for folder in used}
        free = [
            folder
            for folder, held in versions.items()
            if folder.is_dir() and folder.resolve() not in in_use and not any(one.aliases for one in held)
        ]
        free.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        removed = []
        for folder in free[keep:]:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            removed.append(Fetched(folder, size))
            if not is_dry_run:
                _remove(folder)
        return removed

    def _download(self, source: str, scratch: str) -> str:
        folder: str = self._mlflow.artifacts.download_artifacts(
            source, dst_path=scratch, tracking_uri=self._uri, registry_uri=self._uri
        )
        return folder

    def note(self, one: Registered, tags: Mapping[str, str], document: Mapping[str, Any], file: str) -> None:
        """Put `tags` on a version and keep `document` as the JSON artifact `file` of its run."""
        with mlflow_errors(f"noting a decision on version {one.version}"):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, one.version, key, value)
            if one.run_id:
                self._client.log_dict(one.run_id, dict(document), file)

    def set_alias(self, alias: Alias, one: Registered) -> None:
        """Let `alias` mean this version from now on."""
        with mlflow_errors(f"setting the alias {alias}"):
            self._client.set_registered_model_alias(self.name, alias, one.version)

    def follow(self, champion: str, previous: str | None) -> Registered | None:
        """Let the aliases say what is served: the bundle of version `champion`, and before it that of `previous`.

        Bundles that are not in the registry get no alias, and take it from the one that had it. Returns the version
        of the champion, if it is in the registry.
        """
        chosen = {"champion": self.find(champion), "previous": self.find(previous) if previous else None}
        held = {alias: one for one in self.history() for alias in one.aliases}
        with mlflow_errors("moving aliases"):
            for alias, one in chosen.items():
                if one is not None:
                    self._client.set_registered_model_alias(self.name, alias, one.version)
                elif alias in held:
                    self._client.delete_registered_model_alias(self.name, alias)
            challenger = held.get("challenger")
            if challenger is not None and challenger == chosen["champion"]:
                self._client.delete_registered_model_alias(self.name, "challenger")
        return chosen["champion"]


def _remove(folder: Path) -> None:
    # Out of the way first: half a bundle must not be taken for one.
    with tempfile.TemporaryDirectory(prefix=".prune-", dir=folder.parent) as scratch:
        os.replace(folder, Path(scratch) / folder.name)


def _move(found: Path, target: Path) -> None:
    try:
        os.replace(found, target)
    except OSError:
        # Another process was quicker; what it put there is the same.
        if not target.is_dir():
            raise
        shutil.rmtree(found)
