"""An API that classifies without a model: `python -m benchmarks.day.standin PORT`. The label follows from the text."""

import asyncio
import sys
from typing import Any

import orjson
from aiohttp import web

VERSION = "stand-in"
_LABELS = ("negative", "neutral", "positive")


async def _answer(request: web.Request) -> web.Response:
    texts = orjson.loads(await request.read())["texts"]
    body = orjson.dumps({"model_version": VERSION, "predictions": [_prediction(text) for text in texts]})
    return web.Response(body=body, content_type="application/json")


def _prediction(text: str) -> dict[str, Any]:
    label = _LABELS[len(text) % 3]
    scores = {name: 0.8 if name == label else 0.1 for name in _LABELS}
    return {"label": label, "confidence": 0.8, "scores": scores, "model_version": VERSION}


async def _serve(port: int) -> None:
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/predict/batch", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
