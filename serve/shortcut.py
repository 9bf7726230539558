"""The way of the prediction routes past Ray Serve's own handling of each request.

Serve 2.60 spends 0.38 ms of processor time on a request that reaches a replica (two tasks, its queue, its metrics),
more than twice what the whole of Overtone's own handling takes. For the two prediction routes all of that is done here
already: the batcher is the queue, `serve.http` counts and watches for clients that leave. So they go from the replica's
HTTP server straight to the application; everything else, Serve's health checks included, takes the usual way.

Serve calls `middlewares` in each of its HTTP servers, through `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`. Its count of
ongoing requests does not see these; when it stops a replica, its HTTP server still ends them first.
"""

import asyncio

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http import HOT_ROUTES


class Shortcut:
    """Hands requests of the hot routes to the application of this process, if there is one."""

    _target: tuple[ASGIApp, asyncio.AbstractEventLoop] | None = None

    def __init__(self, app: ASGIApp) -> None:
        self._usual_way = app

    @classmethod
    def open(cls, application: ASGIApp) -> None:
        """Let requests of the hot routes go to `application`, which belongs to the running event loop."""
        cls._target = application, asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        application = self._usual_way
        if self._target is not None and scope["type"] == "http" and (scope["method"], scope["path"]) in HOT_ROUTES:
            target, loop = self._target
            if loop is asyncio.get_running_loop():
                application = target
        await application(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around its HTTP servers."""
    return [Middleware(Shortcut)]
