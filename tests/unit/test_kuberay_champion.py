"""What is to be done about a champion, from the RayService and what is remembered on it."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import yaml

from kuberay.build import Document, build_overlay
from kuberay.champion import DEFAULT, NOTE, WITHDRAWN, Champion, Note, folders_in_use, next_step, note_of
from kuberay.spec import remembered
from kuberay.states import state_of
from overtone.errors import ClusterError

SERVICE = next(each for each in build_overlay("production") if each["kind"] == "RayService")
CHAMPION = Champion("moods-2", "/models/bundles/moods-2")
FOLDERS = {None: "tweets-0", "default": "tweets-0", "/models/bundles/run-2": "moods-2", "/models/bundles/o": "other-1"}
TRIED = Note("moods-2", CHAMPION.folder, "served", "2026-11-01T00:00:00+00:00")


def version_of(folder: str | None) -> str | None:
    return FOLDERS.get(folder)


def service(bundle: str | None = None, *, note: Note | None = None, withdrawn: str = "", **spec: Any) -> Document:
    """A RayService that is ready and serves `bundle`."""
    found = deepcopy(SERVICE)
    config = yaml.safe_load(found["spec"]["serveConfigV2"])
    config["applications"][0]["deployments"][0]["user_config"]["bundle"] = bundle
    found["spec"] |= {"serveConfigV2": yaml.safe_dump(config), **spec}
    marks = {NOTE: note.as_annotation() if note else "", WITHDRAWN: withdrawn}
    found["metadata"]["annotations"] = {name: value for name, value in marks.items() if value}
    found["status"] = {
        "observedGeneration": 0,
        "conditions": [{"type": "Ready", "status": "True"}],
        "activeServiceStatus": {
            "rayClusterName": "overtone-1",
            "applicationStatuses": {"overtone": {"status": "RUNNING"}},
        },
    }
    return found


@pytest.mark.parametrize(
    ("state", "action", "told"),
    [
        (service(), "serve", "not served yet"),
        (service("/models/bundles/run-2"), "served", "it is served"),
        (service(CHAMPION.folder), "served", "it is served"),
        (service("/models/gone"), "serve", "not served yet"),
        (service(note=replace(TRIED, version="moods-1", state="refused")), "serve", "not served yet"),
        (service(note=replace(TRIED, state="refused", reason="golden scores differ")), "held", "golden scores differ"),
        (service(note=TRIED), "held", "something else since"),
        (service("/models/bundles/o", note=replace(TRIED, state="started")), "held", "something else since"),
        (service(CHAMPION.folder, note=replace(TRIED, state="started")), "finish", "cut off"),
        (service(note=replace(TRIED, state="held", reason="it was rolled back")), "held", "it was rolled back"),
        (service(withdrawn=CHAMPION.folder), "held", "rolled back"),
        (service(withdrawn="/models/bundles/run-2"), "held", "rolled back"),
        (service(withdrawn="/models/bundles/o"), "serve", "not served yet"),
        (service("/models/bundles/o", withdrawn=DEFAULT), "serve", "not served yet"),
        (service(suspend=True), "waits", "suspended"),
        (service(upgradeStrategy={"type": "NewCluster"}), "waits", "image"),
    ],
)
def test_a_champion_is_ordered_once(state: Document, action: str, told: str) -> None:
    step = next_step(state, CHAMPION, version_of)
    assert (step.action, told in step.reason) == (action, True), step
    forced = next_step(state, CHAMPION, version_of, force=True)
    assert forced.action == ("serve" if action == "held" else action)


def test_a_stack_that_is_not_ready_is_left_alone_unless_forced() -> None:
    state = service()
    assert state_of(state).ready
    applications = state["status"]["activeServiceStatus"]["applicationStatuses"]
    applications["overtone"] = {"status": "DEPLOY_FAILED", "message": "no memory"}
    step = next_step(state, CHAMPION, version_of)
    assert (step.action, "no memory" in step.reason) == ("waits", True)
    assert next_step(state, CHAMPION, version_of, force=True).action == "serve"


def test_a_note_is_read_as_it_was_written_and_a_broken_one_is_named() -> None:
    note = replace(TRIED, state="refused", reason='"quoted"', previous="/models/bundles/o")
    assert note_of(service(note=note)) == note
    assert note_of(service()) is None
    for text in ("{", '{"version": "x", "unknown": 1}', "[1]"):
        state = service()
        state["metadata"]["annotations"][NOTE] = text
        with pytest.raises(ClusterError, match="overtone/champion of the RayService cannot be read; remove it"):
            note_of(state)


def test_what_the_service_names_is_in_use() -> None:
    found = service("/b/now", note=replace(TRIED, folder="/b/noted", previous="/b/noted-before"), withdrawn="/b/back")
    config = yaml.safe_load(found["spec"]["serveConfigV2"])
    config["applications"][0]["deployments"][0]["user_config"]["challenger"] = "/b/trial"
    found["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    found["metadata"]["annotations"] |= remembered(service("/b/before"))["metadata"]["annotations"]

    assert folders_in_use(found) == {
        f"/b/{name}" for name in ("now", "trial", "before", "noted", "noted-before", "back")
    }
    assert folders_in_use(service(withdrawn=DEFAULT)) == set()
