"""The RayService as a document: what it says is served, and patches that say otherwise. Pure."""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import yaml

from kuberay.build import Document

HISTORY = "overtone/before-rollout"
"""Annotation of the RayService: what the last rollout replaced, as JSON."""

Patch = dict[str, Any]


def annotated(marks: Mapping[str, str | None]) -> Patch:
    """A patch that sets annotations; None takes one away."""
    return {"metadata": {"annotations": dict(marks)}} if marks else {}


def remembered(service: Document, marks: Mapping[str, str | None] | None = None) -> Patch:
    """A patch that keeps what `service` serves for `roll_back`, with other annotations beside it."""
    kept = json.dumps({"serveConfigV2": service["spec"]["serveConfigV2"], "image": image_of(service)})
    return annotated({HISTORY: kept, **(marks or {})})


def before_rollout(service: Document) -> dict[str, str] | None:
    """What `remembered` kept last, of the fields `serveConfigV2` and `image`; None if there was no rollout."""
    kept = annotation(service, HISTORY)
    return dict(json.loads(kept)) if kept else None


def with_bundle(service: Document, bundle: str | None) -> str:
    """The `serveConfigV2` of `service` with `bundle` as champion and nothing on trial, as the next revision."""
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    live = config["applications"][0]["deployments"][0].setdefault("user_config", {})
    revision = int(live.get("revision") or 0) + 1
    live.update(bundle=bundle, challenger=None, shadow=0.0, canary=0.0, revision=revision)
    return str(yaml.safe_dump(config, sort_keys=False))


def image_of(service: Document) -> str:
    """The image of the head."""
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return str(head["template"]["spec"]["containers"][0]["image"])


def with_image(cluster: Document, image: str) -> Document:
    """The groups of `cluster` with `image`; those on CUDA with its variant for CUDA."""
    head, groups = deepcopy(cluster["headGroupSpec"]), deepcopy(cluster.get("workerGroupSpecs") or [])
    for group in (head, *groups):
        pod = group["template"]["spec"]
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            container["image"] = image + ("-cuda" if container["image"].endswith("-cuda") else "")
    return {"headGroupSpec": head, "workerGroupSpecs": groups}


def renumbered(config: str, now: Document) -> str:
    """`config` with a revision above that of `now`: a canary that was taken back must be able to begin again."""
    past, present = yaml.safe_load(config), yaml.safe_load(now["spec"]["serveConfigV2"])
    live = present["applications"][0]["deployments"][0].get("user_config") or {}
    number = int(live.get("revision") or 0) + 1
    past["applications"][0]["deployments"][0].setdefault("user_config", {})["revision"] = number
    return yaml.safe_dump(past, sort_keys=False)


def with_live_bundle(document: Document, before: Document) -> Document:
    """`document` with what `before` serves by a rollout: deploying again does not undo it."""
    if HISTORY not in (before["metadata"].get("annotations") or {}):
        return document
    sent = deepcopy(document)
    config, present = (yaml.safe_load(each["spec"]["serveConfigV2"]) for each in (sent, before))
    live = present["applications"][0]["deployments"][0].get("user_config")
    config["applications"][0]["deployments"][0]["user_config"] = live
    sent["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    return sent


def content_of(document: Document) -> Document:
    """`document` less what the server and controllers write into every object."""
    metadata = document["metadata"]
    kept = {key: metadata[key] for key in ("name", "namespace", "labels", "annotations") if metadata.get(key)}
    return {key: value for key, value in document.items() if key not in {"metadata", "status"}} | {"metadata": kept}


def annotation(service: Document, name: str) -> str | None:
    """An annotation, None if it is not there."""
    found = (service["metadata"].get("annotations") or {}).get(name)
    return str(found) if found else None


def live_options(service: Document) -> dict[str, Any]:
    """The `user_config` that the RayService orders: the values of `serve.rollout.LiveOptions`."""
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    return dict(config["applications"][0]["deployments"][0].get("user_config") or {})
