"""Files that take longest go first, so that none of several workers ends long after the others."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest: dict[object, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0.0), mark.args[0] if mark else 0.0)
    items.sort(key=lambda item: -longest[item.path])
