"""The prediction routes: a body in, the labels of its texts out."""

import asyncio
from functools import cache
from typing import Any

from fastapi import Request
from starlette.responses import Response

from overtone import metrics
from overtone.bundle import Bundle
from serve import bodies, options
from serve.auth import Identity
from serve.batcher import Timing
from serve.classifier import INTERACTIVE_TEXTS
from serve.encodings import compressed
from serve.explain import MAX_TEXTS, occlusion
from serve.longtext import Scores
from serve.ndjson import Stream, StreamedAnswers, is_ndjson
from serve.options import PLAIN, Options
from serve.problems import problem
from serve.service import Service, json_response, while_there


class PredictionRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def predict(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "predict")
        value, asked = options.split(await bodies.read_json(request), "text")
        text = bodies.checked_text(value)
        if asked is not PLAIN:
            (prediction,), _ = await self._predicted(request, identity, [text], asked)
            if isinstance(prediction, Exception):
                raise prediction
            return json_response(prediction)
        deadline_s = self._service.deadline_s(request, is_bulk=False)
        await self._service.gate.spend(identity, 1)
        timing = request.scope["overtone.timing"] = Timing()
        answer = await while_there(
            request,
            self._service.classifier.classify(
                [text],
                timing=timing,
                deadline_s=deadline_s,
                request_id=request.scope.get("overtone.request_id"),
            ),
        )
        row = answer.rows[0]
        if isinstance(row, Exception):
            raise row
        request.scope["overtone.prediction"] = {"model_version": answer.bundle.version, "confidence": max(row)}
        return json_response(_prediction(answer.bundle, row))

    async def predict_batch(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "predict")
        asked = options.from_query(request.query_params.multi_items()) if request.scope.get("query_string") else PLAIN
        if is_ndjson(request):
            return self._streamed(request, identity, asked)
        value, asked = options.split(await bodies.read_json(request), "texts", asked)
        texts = bodies.checked_texts(value)
        predictions, bundle = await self._predicted(request, identity, texts, asked)
        shown = [{"error": problem(request, item)} if isinstance(item, Exception) else item for item in predictions]
        response = json_response({"predictions": shown, "model_version": bundle.version})
        return await compressed(response, request.scope["headers"])

    def _streamed(self, request: Request, identity: Identity, asked: Options) -> Response:
        service = self._service
        asked.check_labels(len(service.classifier.bundle.labels))
        if asked.explain:
            raise bodies.invalid([bodies.FieldError("explain", "is not for streamed batches")])
        deadline_s = service.deadline_s(request, is_bulk=True)

        async def spend(texts: int) -> None:
            await service.gate.spend(identity, texts)

        async def classify(texts: list[str]) -> list[Any]:
            answer = await service.classifier.classify(
                texts, deadline_s=deadline_s, long_text=asked.long_text, priority="bulk"
            )
            return [_shown(answer.bundle, row, asked) for row in answer.rows]

        return StreamedAnswers(request, Stream(spend, classify, patience_s=deadline_s))

    async def _predicted(
        self, request: Request, identity: Identity, texts: list[str], asked: Options
    ) -> tuple[list[dict[str, Any] | Exception], Bundle]:
        """The prediction of each text, or why it has none."""
        service = self._service
        if asked is not PLAIN:
            asked.check_labels(len(service.classifier.bundle.labels))
        if asked.explain:
            return await self._explained(request, identity, texts, asked)
        deadline_s = service.deadline_s(request, is_bulk=len(texts) > INTERACTIVE_TEXTS)
        await service.gate.spend(identity, len(texts))
        timing = request.scope["overtone.timing"] = Timing()
        work = service.classifier.classify(
            texts,
            timing=timing,
            deadline_s=deadline_s,
            long_text=asked.long_text,
            request_id=request.scope.get("overtone.request_id"),
        )
        answer = await while_there(request, work)
        return [_shown(answer.bundle, row, asked) for row in answer.rows], answer.bundle

    async def _explained(
        self, request: Request, identity: Identity, texts: list[str], asked: Options
    ) -> tuple[list[dict[str, Any] | Exception], Bundle]:
        if len(texts) > MAX_TEXTS:
            problem = f"can be true for at most {MAX_TEXTS} texts a request"
            raise bodies.invalid([bodies.FieldError("explain", problem, MAX_TEXTS, len(texts))])
        classifier = self._service.classifier
        occlusions = await asyncio.to_thread(lambda: [occlusion(classifier.encoder, text) for text in texts])
        variants = [variant for item in occlusions for variant in item.variants]
        deadline_s = self._service.deadline_s(request, is_bulk=False)
        await self._service.gate.spend(identity, len(variants))
        work = classifier.classify(variants, deadline_s=deadline_s, long_text=asked.long_text)
        answer = await while_there(request, work)
        predictions: list[dict[str, Any] | Exception] = []
        start = 0
        for item in occlusions:
            rows = answer.rows[start : start + len(item.variants)]
            start += len(item.variants)
            try:
                predictions.append(_shown(answer.bundle, rows[0], asked) | {"explanation": item.explanation(rows)})
            except Exception as error:  # one text's failure must not become its neighbours'
                predictions.append(error)
        return predictions, answer.bundle


def _shown(bundle: Bundle, row: Scores | Exception, asked: Options) -> Any:
    """The result `row` of `bundle`, as `asked`."""
    if isinstance(row, Exception):
        return row
    prediction = _prediction(bundle, row)
    if asked.top_k is not None:
        best = sorted(prediction["scores"].items(), key=lambda item: -item[1])[: asked.top_k]
        prediction["scores"] = dict(best)
    if asked.threshold is not None:
        prediction["abstained"] = prediction["confidence"] < asked.threshold
        if prediction["abstained"]:
            prediction["label"] = None
    return prediction


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
