"""The routes of browser sessions: an API key or a one-time link in, a cookie out."""

from contextlib import suppress

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from overtone import errors
from serve import bodies
from serve.auth import SESSION_COOKIE
from serve.service import Service

_SESSION_S = 7 * 86_400


class SessionRoutes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def sign_in(self, request: Request) -> Response:
        token = request.query_params.get("token", "")
        secret = await self._service.records.exchange_sign_in(token[:512]) if token else None
        if secret is None:
            raise errors.UnauthorizedError("This link was used or has expired; `overtone status` prints a new one.")
        return _with_session(RedirectResponse("/", status_code=303), request, secret)

    async def session(self, request: Request) -> Response:
        await self._service.gate.authorise(request, "read")
        return Response(status_code=204, headers={"cache-control": "no-store"})

    async def start_session(self, request: Request) -> Response:
        body = await bodies.read_json(request, max_bytes=bodies.MAX_SMALL_BODY_BYTES)
        key = body.get("key") if isinstance(body, dict) else None
        if not isinstance(key, str) or not key:
            raise bodies.invalid([bodies.FieldError("key", "must be an API key")])
        identity = await self._service.gate.keys.check(key, "read")
        secret = await self._service.records.create_session(identity.key_id, identity.expires_at)
        if secret is None:
            raise errors.UnauthorizedError("The API key is not known, was revoked or has expired.")
        return _with_session(Response(status_code=204), request, secret)

    async def end_session(self, request: Request) -> Response:
        secret = request.cookies.get(SESSION_COOKIE)
        if secret:
            # Whoever has no session is signed out already.
            with suppress(errors.UnauthorizedError, errors.ForbiddenError):
                identity = await self._service.gate.keys.check(secret, "read")
                if identity.is_session:
                    await self._service.records.end_session(identity.key_id)
        response = Response(status_code=204, headers={"cache-control": "no-store"})
        response.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="strict")
        return response


def _with_session(response: Response, request: Request, secret: str) -> Response:
    is_https = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
    response.set_cookie(
        SESSION_COOKIE, secret, max_age=_SESSION_S, path="/", httponly=True, samesite="strict", secure=is_https
    )
    response.headers["cache-control"] = "no-store"
    return response
