"""The prediction routes: a body in, the labels of its texts out."""

import asyncio
from functools import cache
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from overtone import metrics
from overtone.bundle import Bundle
from serve import bodies
from serve.classifier import INTERACTIVE_TEXTS, Answer, Scores
from serve.problems import problem
from serve.service import Service, json_response


class PredictionRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def predict(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "predict")
        text = bodies.text_of(await bodies.read_json(request))
        answer = await self._classify(request, [text], self._service.interactive_deadline_s)
        row = answer.rows[0]
        if isinstance(row, Exception):
            raise row
        return json_response(_prediction(answer.bundle, row))

    async def predict_batch(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "predict")
        texts = bodies.texts_of(await bodies.read_json(request))
        service = self._service
        is_bulk = len(texts) > INTERACTIVE_TEXTS
        deadline_s = service.bulk_deadline_s if is_bulk else service.interactive_deadline_s
        answer = await self._classify(request, texts, deadline_s)
        predictions = [
            {"error": problem(request, row)} if isinstance(row, Exception) else _prediction(answer.bundle, row)
            for row in answer.rows
        ]
        return json_response({"predictions": predictions, "model_version": answer.bundle.version})

    async def _classify(self, request: Request, texts: list[str], deadline_s: float) -> Answer:
        """Classify for as long as the client is there; its body has been read."""
        current = asyncio.current_task()
        assert current is not None
        watch = asyncio.get_running_loop().create_task(_cancel_when_left(request.receive, current))
        try:
            return await self._service.classifier.classify(texts, deadline_s=deadline_s)
        except asyncio.CancelledError:
            if not watch.done() or watch.cancelled():
                raise
            current.uncancel()
            raise ClientDisconnect from None
        finally:
            watch.cancel()


async def _cancel_when_left(receive: Receive, task: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _prediction(bundle: Bundle, scores: Scores) -> dict[str, Any]:
    confidence = max(scores)
    label = bundle.labels[scores.index(confidence)]
    _confidence(label).observe(confidence)
    return {
        "label": label,
        "confidence": confidence,
        "scores": dict(zip(bundle.labels, scores, strict=True)),
        "model_version": bundle.version,
    }


@cache
def _confidence(label: str) -> Any:
    return metrics.CONFIDENCE.labels(label)
