"""`overtone models` without a stack: orders are checked, refused or written down for the next start."""

import json
from io import StringIO
from pathlib import Path
from shutil import copytree

import pytest
from rich.console import Console

from overtone.bundle import Bundle
from overtone.cli import models
from overtone.cli.models import order
from overtone.cli.rollout import Rollout, load_rollout, rollout_file, save_rollout
from overtone.errors import BundleError, ConfigurationError
from overtone.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, tiny_bundle: Bundle) -> Settings:
    return load_settings(overtone_home=tmp_path / "home", bundle=tiny_bundle.path)


@pytest.fixture
def other(tiny_bundle: Bundle, tmp_path: Path) -> str:
    return str(copytree(tiny_bundle.path, tmp_path / "other"))


def test_an_order_is_kept_for_the_next_start(settings: Settings, other: str) -> None:
    out = StringIO()

    done = order(settings, lambda it: it.trying(other, canary=0.1), Console(file=out), is_dry_run=False, as_json=True)

    assert done == 0
    assert json.loads(out.getvalue())["state"] == "takes effect at the next start"
    kept = load_rollout(settings.home)
    assert kept == Rollout(challenger=other, canary=0.1, revision=1)
    assert kept.live()["challenger"] == other


def test_a_dry_run_changes_nothing(settings: Settings, other: str) -> None:
    order(settings, lambda it: it.promoted(other), Console(file=StringIO()), is_dry_run=True, as_json=False)

    assert not rollout_file(settings.home).exists()


def test_a_bundle_that_is_not_fit_is_refused_before_anything_is_changed(settings: Settings, other: str) -> None:
    (Path(other) / "model.onnx").write_bytes(b"not a model")

    with pytest.raises(BundleError, match="sha256"):
        order(settings, lambda it: it.promoted(other), Console(file=StringIO()), is_dry_run=False, as_json=False)

    assert load_rollout(settings.home) == Rollout()


def test_what_was_served_is_ordered_again_when_a_replica_refuses(
    settings: Settings, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[Rollout] = []

    class Obeying:
        def order(self, word: str) -> None:
            orders.append(load_rollout(settings.home))

        def await_answer(self, word: str, timeout_s: float) -> dict[str, int]:
            return {"replicas": 1}

        def close(self) -> None:
            pass

    def look(_settings: Settings, _times: int) -> list[dict[str, object]]:
        return [
            {
                "replica": "a",
                "revision": orders[-1].revision,
                "champion": {"folder": str(settings.bundle), "version": "old"},
                "challenger": None,
                "refused": [{"reason": "it failed here"}],
            }
        ]

    monkeypatch.setattr(models, "_is_up", lambda _settings: True)
    monkeypatch.setattr(models, "_driver", lambda _settings: Obeying())
    monkeypatch.setattr(models, "_look", look)

    with pytest.raises(BundleError, match="it failed here"):
        order(settings, lambda it: it.promoted(other), Console(file=StringIO()), is_dry_run=False, as_json=False)

    assert [(one.champion, one.revision) for one in orders] == [(other, 1), (None, 2)]
    assert load_rollout(settings.home) == orders[-1]


def test_promote_and_rollback_change_places() -> None:
    promoted = Rollout(challenger="/b", canary=0.5).promoted("/b")
    back = promoted.rolled_back()

    assert (promoted.champion, promoted.challenger, promoted.canary) == ("/b", None, 0.0)
    assert (back.champion, back.previous, back.revision) == (None, "/b", 2)
    assert back.rolled_back().champion == "/b"


def test_shares_stay_until_they_are_changed() -> None:
    trying = Rollout().trying("/b", shadow=0.2).trying(None, canary=0.1)

    assert (trying.challenger, trying.shadow, trying.canary) == ("/b", 0.2, 0.1)
    assert trying.trying("/c", canary=0.3).shadow == 0.0
    assert trying.trying(None, canary=0.0).trying(None, shadow=0.0).challenger is None


def test_orders_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no challenger"):
        Rollout().trying(None, canary=0.1)
    with pytest.raises(ConfigurationError, match="no champion to return to"):
        Rollout().rolled_back()
    with pytest.raises(ConfigurationError, match="already"):
        Rollout(champion="/a").promoted("/a")
    with pytest.raises(ConfigurationError, match="another one"):
        Rollout(champion="/a").trying("/a", shadow=1.0)
    with pytest.raises(ConfigurationError, match="neither a folder"):
        Rollout().folder_of(str(tmp_path / "nothing"))
    with pytest.raises(ConfigurationError, match="no challenger"):
        Rollout().folder_of("challenger")


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    save_rollout(tmp_path, Rollout(champion="/a"))
    assert load_rollout(tmp_path) == Rollout(champion="/a")
    rollout_file(tmp_path).write_text("{", encoding="utf-8")

    with pytest.raises(ConfigurationError, match=r"models\.json"):
        load_rollout(tmp_path)
