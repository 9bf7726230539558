"""The route that says which bundles a replica serves, and how a trial goes."""

from dataclasses import asdict
from typing import Any

from fastapi import Request
from starlette.responses import Response

from overtone.bundle import Bundle
from serve.classifier import Classifier, Trial
from serve.rollout import Side
from serve.service import Service, json_response


class ModelRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "read")
        return json_response(models_of(self._service.classifier, self._service.replica), cached=False)


def models_of(classifier: Classifier, replica: str) -> dict[str, Any]:
    """What one replica serves, ready for JSON."""
    return {
        "replica": replica,
        "revision": classifier.revision,
        "champion": _bundle(classifier.bundle),
        "challenger": _challenger(classifier.trial) if classifier.trial else None,
        "refused": [asdict(refusal) for refusal in classifier.refusals],
    }


def _bundle(bundle: Bundle) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "version": bundle.version,
        "folder": str(bundle.path),
        "labels": bundle.labels,
        "max_length": bundle.max_length,
        "precision": bundle.precision,
        "base_model": bundle.base_model,
        "license": bundle.license,
        "created_at": bundle.created_at,
        "metrics": dict(bundle.metrics),
    }


def _challenger(trial: Trial) -> dict[str, Any]:
    canary, shadow = trial.canary, trial.shadow
    compared = shadow.agreement.total()
    agreed = sum(count for (ours, theirs), count in shadow.agreement.items() if ours == theirs)
    return _bundle(trial.model.bundle) | {
        "canary": {
            "share": canary.share,
            "configured_share": canary.configured,
            "rollback_reason": canary.reason,
            "champion": _side(canary.champion),
            "challenger": _side(canary.challenger),
        },
        "shadow": {
            "share": shadow.share,
            "compared": compared,
            "agreement": agreed / compared if compared else None,
            "labels": [
                {"champion": ours, "challenger": theirs, "texts": count}
                for (ours, theirs), count in sorted(shadow.agreement.items())
            ],
            "dropped": shadow.dropped,
            "failed": shadow.failed,
        },
    }


def _side(side: Side) -> dict[str, Any]:
    p99 = side.p99()
    p99_ms = None if p99 is None else round(p99 * 1e3, 3)
    return {"requests": side.requests, "errors": side.errors, "p99_ms": p99_ms}
