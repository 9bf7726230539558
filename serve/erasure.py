"""The routes that erase posts and authors."""

from fastapi import Request
from starlette.responses import Response

from overtone.erasure import Kind
from overtone.errors import InvalidInputError
from serve.service import Service, json_response


class ErasureRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def erase_post(self, request: Request) -> Response:
        return await self._erase("post", request)

    async def erase_author(self, request: Request) -> Response:
        return await self._erase("author", request)

    async def _erase(self, kind: Kind, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "admin")
        written = request.path_params[f"{kind}_id"]
        # int() takes signs, spaces and the digits of other scripts too.
        if not (written.isascii() and written.isdigit() and len(written) <= 19):
            raise InvalidInputError("The id must be a number of at most 19 digits.")
        receipt = await self._service.records.erase(kind, int(written), actor=identity.key_id)
        return json_response(receipt, cached=False)
