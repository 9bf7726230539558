"""The way of the prediction routes past Ray Serve's own handling of each request.

Serve 2.60 spends 0.38 ms of processor time on a request that reaches a replica (two tasks, its queue, its metrics),
more than twice what the whole of Overtone's own handling takes. For the two prediction routes all of that is done here
already: the batcher is the queue, `serve.http` counts and watches for clients that leave. So they go from the replica's
HTTP server straight to the application; everything else, Serve's health checks included, takes the usual way.

Serve calls `middlewares` in each of its HTTP servers, through `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`. Its count of
ongoing requests does not see these; when it stops a replica, its HTTP server still ends them first.

An answer that is whole is written whole. Uvicorn writes its head and its body apart, and uvloop sends each at once:
under load that leaves a hundredth of the time in which a replica that dies has sent half an answer, and nobody can
then ask another one.
"""

import asyncio
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
                application, send = target, _in_one_write(send)
        await application(scope, receive, send)


class _Joined:
    """A connection that keeps what is written to it until `flush`."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._kept: list[bytes] = []
        self.write = self._kept.append

    def flush(self) -> None:
        if self._kept:
            self._transport.write(b"".join(self._kept))
            self._kept.clear()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _in_one_write(send: Send) -> Send:
    """`send` of uvicorn, which writes the head of an answer along with its body if that has one part; else `send`."""
    cycle: Any = getattr(send, "__self__", None)
    if not hasattr(cycle, "transport"):
        return send
    head: Message | None = None

    async def send_joined(message: Message) -> None:
        nonlocal head
        if message["type"] == "http.response.start":
            head = message
            return
        if head is None:
            await send(message)
            return
        start, head = head, None
        if message.get("more_body"):
            await send(start)
            await send(message)
            return
        transport = cycle.transport
        cycle.transport = joined = _Joined(transport)
        try:
            await send(start)
            await send(message)
        finally:
            cycle.transport = transport
        joined.flush()

    return send_joined


def middlewares() -> list[Middleware]:
    """What Serve puts around its HTTP servers."""
    return [Middleware(Shortcut)]
