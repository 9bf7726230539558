"""What a home serves, as `overtone models` left it: kept in a file, so that the next start serves the same."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from overtone.bundle import DEFAULT_BUNDLE
from overtone.errors import ConfigurationError, UnavailableError

ALIASES = ("champion", "challenger", "previous", "default")


@dataclass(frozen=True, slots=True)
class Rollout:
    """Which bundles are to be served. Folders are absolute."""

    champion: str | None = None
    """None for the setting BUNDLE, or the bundle in the package."""
    previous: str | None = None
    """The champion before; None if there was none, or if it was the one that no folder names."""
    has_previous: bool = False
    challenger: str | None = None
    shadow: float = 0.0
    canary: float = 0.0
    limits: Mapping[str, float] = field(default_factory=dict)
    revision: int = 0

    def live(self) -> dict[str, Any]:
        """As the replicas take it: the values of `serve.rollout.LiveOptions`."""
        return {
            "bundle": self.champion,
            "challenger": self.challenger,
            "shadow": self.shadow,
            "canary": self.canary,
            "limits": dict(self.limits),
            "revision": self.revision,
        }

    def folder_of(self, name: str) -> str | None:
        """The folder that `name` means: an alias, or a folder; None for the default bundle's setting.

        Raises:
            ConfigurationError: it is neither.
        """
        if name == "default":
            return str(DEFAULT_BUNDLE)
        if name in ALIASES:
            if name == "champion":
                return self.champion
            folder = self.challenger if name == "challenger" else self.previous
            if folder is None and not (name == "previous" and self.has_previous):
                raise ConfigurationError(f"There is no {name}. `overtone models list` shows what there is.")
            return folder
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ConfigurationError(f"{name}: is neither a folder nor one of {', '.join(ALIASES)}.")
        return str(path.resolve())

    def promoted(self, folder: str | None) -> "Rollout":
        """With the bundle in `folder` as champion, and nothing on trial."""
        if folder == self.champion:
            raise ConfigurationError("That bundle is the champion already.")
        return Rollout(folder, self.champion, True, limits=self.limits, revision=self.revision + 1)

    def rolled_back(self) -> "Rollout":
        """With the champion before; another time returns to the one of now.

        Raises:
            ConfigurationError: there was none.
        """
        if not self.has_previous:
            raise ConfigurationError("There is no champion to return to: none was promoted in this home.")
        return self.promoted(self.previous)

    def trying(self, folder: str | None, *, shadow: float | None = None, canary: float | None = None) -> "Rollout":
        """With the bundle in `folder` (None: the challenger there is) on trial; a share that is not given stays.

        Raises:
            ConfigurationError: there is no challenger, or it is the champion.
        """
        chosen = folder or self.challenger
        if chosen is None:
            raise ConfigurationError("There is no challenger: name the folder of one.")
        if chosen == self.champion:
            raise ConfigurationError("That bundle is the champion; a challenger must be another one.")
        is_same = chosen == self.challenger
        seen = (self.shadow if is_same else 0.0) if shadow is None else shadow
        answered = (self.canary if is_same else 0.0) if canary is None else canary
        kept = chosen if seen or answered else None
        return replace(self, challenger=kept, revision=self.revision + 1, shadow=seen, canary=answered)


def rollout_file(home: Path) -> Path:
    """Where the rollout of `home` is kept."""
    return home / "models.json"


def load_rollout(home: Path) -> Rollout:
    """The rollout of `home`; a fresh one if nothing was ordered yet.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    path = rollout_file(home)
    try:
        return Rollout(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Rollout()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path}: cannot be read; mend or remove it ({error})") from error


def save_rollout(home: Path, rollout: Rollout) -> None:
    """Keep `rollout` for the next start, whole or not at all."""
    path = rollout_file(home)
    staging = path.with_suffix(".new")
    staging.write_text(json.dumps(asdict(rollout), indent=1), encoding="utf-8")
    staging.replace(path)


def save_running(home: Path, address: str, args: Mapping[str, Any]) -> None:
    """Note the Ray instance that serves now, and what the application was started with."""
    _running_file(home).write_text(json.dumps({"address": address, "args": dict(args)}), encoding="utf-8")


def load_running(home: Path) -> tuple[str, dict[str, Any]]:
    """What `save_running` noted.

    Raises:
        UnavailableError: nothing is noted.
    """
    try:
        noted = json.loads(_running_file(home).read_text(encoding="utf-8"))
        return noted["address"], noted["args"]
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(f"Nothing is served in {home}. `overtone up` starts it.") from error


def _running_file(home: Path) -> Path:
    return home / "run" / "serve.json"
