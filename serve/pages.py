"""The routes that read: state, figures, metrics, and the page with its files."""

import asyncio
import re

from fastapi import Request
from starlette.responses import Response

from overtone import metrics
from serve import bodies
from serve.files import file_response
from serve.service import Service, json_response


class PageRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def stats(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "read")
        minutes = _whole_number(request, "minutes", default=30, low=1, high=1440)
        newest = _whole_number(request, "newest", default=50, low=0, high=200)
        return json_response(await self._service.records.figures(minutes=minutes, newest=newest), cached=False)

    async def health(self, request: Request) -> Response:
        return json_response({"status": "alive"}, cached=False)

    async def ready(self, request: Request) -> Response:
        version = self._service.classifier.bundle.version
        return json_response({"status": "ready", "model_version": version}, cached=False)

    async def metrics(self, request: Request) -> Response:
        text = await asyncio.to_thread(metrics.exposition, self._service.metrics_folder)
        return Response(text, headers={"content-type": metrics.CONTENT_TYPE, "cache-control": "no-store"})

    async def page(self, request: Request) -> Response:
        return file_response("index.html")

    async def docs(self, request: Request) -> Response:
        return file_response("docs.html")

    async def static(self, request: Request) -> Response:
        return file_response(request.path_params["path"])


def _whole_number(request: Request, name: str, *, default: int, low: int, high: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    value = int(given) if re.fullmatch(r"\d{1,9}", given, re.ASCII) else None
    if value is None or not low <= value <= high:
        raise bodies.invalid([bodies.FieldError(name, f"must be a whole number from {low} to {high}", high, value)])
    return value
