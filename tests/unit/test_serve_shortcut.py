"""Which requests take the short way."""

import asyncio
from typing import Any

import pytest

from serve.shortcut import Shortcut, middlewares


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(Shortcut, "_target", None)
    return []


def way(name: str, taken: list[str]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        taken.append(name)

    return app


async def go(app: Any, method: str = "POST", path: str = "/predict", kind: str = "http") -> None:
    await app({"type": kind, "method": method, "path": path}, None, None)


async def test_without_an_application_all_goes_the_usual_way(taken: list[str]) -> None:
    await go(Shortcut(way("usual", taken)))

    assert taken == ["usual"]


@pytest.mark.parametrize(
    ("method", "path", "kind", "expected"),
    [
        ("POST", "/predict", "http", "short"),
        ("POST", "/predict/batch", "http", "short"),
        ("GET", "/predict", "http", "usual"),
        ("GET", "/-/healthz", "http", "usual"),
        ("POST", "/predict", "websocket", "usual"),
    ],
)
async def test_only_predictions_take_the_short_way(
    taken: list[str], method: str, path: str, kind: str, expected: str
) -> None:
    Shortcut.open(way("short", taken))
    await go(Shortcut(way("usual", taken)), method, path, kind)

    assert taken == [expected]


def test_an_application_of_another_loop_is_not_entered(taken: list[str]) -> None:

    async def open_elsewhere() -> None:
        Shortcut.open(way("short", taken))

    asyncio.run(open_elsewhere())
    asyncio.run(go(Shortcut(way("usual", taken))))

    assert taken == ["usual"]


def test_serve_is_given_the_shortcut() -> None:
    assert [item.cls for item in middlewares()] == [Shortcut]
