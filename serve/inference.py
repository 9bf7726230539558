"""The Open Inference Protocol v2, so that clients of KServe and Triton work unchanged."""

import re
from typing import Any

from fastapi import Request
from starlette.responses import Response

from overtone import __version__
from overtone.bundle import Bundle
from overtone.errors import MalformedError, NotFoundError, UnsupportedMediaTypeError
from serve import bodies, tensors
from serve.classifier import INTERACTIVE_TEXTS
from serve.longtext import Scores
from serve.service import Service, json_response, while_there

STABLE_NAME = "overtone"
"""Names the bundle in use, whichever it is; its own name does too."""

_MEDIA = re.compile(r"(?:application/(?:json|octet-stream|x-www-form-urlencoded)\s*(?:;.*)?)?", re.IGNORECASE)
_LENGTH = re.compile(r"\d{1,12}", re.ASCII)
_HEADER_LENGTH = "inference-header-content-length"


class InferenceRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def v2_server(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "predict")
        return json_response(
            {"name": "overtone", "version": __version__, "extensions": ["binary_tensor_data"]}, cached=False
        )

    async def v2_live(self, _: Request) -> Response:
        return json_response({"live": True}, cached=False)

    async def v2_ready(self, _: Request) -> Response:
        self._service.classifier.bundle  # noqa: B018  (raises while there is none)
        return json_response({"ready": True}, cached=False)

    async def v2_model(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "predict")
        bundle = self._named(request)
        return json_response(
            {
                "name": request.path_params["name"],
                "versions": [bundle.version],
                "platform": "onnxruntime_onnx",
                "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
                "outputs": [
                    {"name": "label", "datatype": "BYTES", "shape": [-1]},
                    {"name": "confidence", "datatype": "FP32", "shape": [-1]},
                    {"name": "scores", "datatype": "FP32", "shape": [-1, len(bundle.labels)]},
                ],
                "parameters": {"labels": list(bundle.labels), "max_length": bundle.max_length},
            },
            cached=False,
        )

    async def v2_model_ready(self, request: Request) -> Response:
        self._named(request)
        return json_response({"name": request.path_params["name"], "ready": True}, cached=False)

    async def v2_infer(self, request: Request) -> Response:
        service = self._service
        identity = await service.gate.authorise(request, "predict")
        self._named(request)
        call = tensors.read_call(*await _body(request))
        deadline_s = service.deadline_s(request, is_bulk=len(call.texts) > INTERACTIVE_TEXTS)
        await service.gate.spend(identity, len(call.texts))
        work = service.classifier.classify(call.texts, deadline_s=deadline_s, long_text=call.long_text)
        answer = await while_there(request, work)
        head = {"model_name": request.path_params["name"], "model_version": answer.bundle.version}
        content, json_length = tensors.write_answer(call, head, answer.bundle.labels, _all_scores(answer.rows))
        if json_length is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={_HEADER_LENGTH: str(json_length)}, media_type="application/octet-stream")

    def _named(self, request: Request) -> Bundle:
        """The bundle in use, if the address names it.

        Raises:
            NotFoundError: it names another one.
            UnavailableError: none is loaded yet.
        """
        bundle = self._service.classifier.bundle
        if request.path_params["name"] not in {bundle.name, STABLE_NAME}:
            raise NotFoundError(f"There is no model of that name; {bundle.name} and {STABLE_NAME} are known.")
        if request.path_params.get("version", bundle.version) != bundle.version:
            raise NotFoundError(f"That version is not in use; {bundle.version} is.")
        return bundle


async def _body(request: Request) -> tuple[bytes, int | None]:
    """The body, unpacked, and the length of the JSON at its start, if binary data may follow it."""
    headers = request.headers
    # The media type is optional in the protocol's clients, and some HTTP libraries then send that of forms.
    if not _MEDIA.fullmatch(headers.get("content-type", "").strip()):
        raise UnsupportedMediaTypeError(
            "The header Content-Type must be application/json or application/octet-stream, or be left out."
        )
    announced = headers.get("content-length")
    body = await bodies.read_bytes(
        request,
        announced.encode("latin-1") if announced else None,
        headers.get("content-encoding", "").encode("latin-1"),
        bodies.MAX_BODY_BYTES,
    )
    length = headers.get(_HEADER_LENGTH)
    if length is None:
        return body, None
    if not _LENGTH.fullmatch(length):
        raise MalformedError("Inference-Header-Content-Length must be a number of bytes.")
    return body, int(length)


def _all_scores(rows: list[Scores | Exception]) -> list[Scores]:
    """`rows`; the protocol knows no answer of which a part failed.

    Raises:
        Exception: what befell the first row that has no scores.
    """
    scores: list[Any] = []
    for row in rows:
        if isinstance(row, Exception):
            raise row
        scores.append(row)
    return scores
