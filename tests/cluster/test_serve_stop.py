"""The end of the stack that the tests before shared: so this file must be the last of them by name."""

import httpx
import pytest

from live_stack import Stack
from serve.environment import haproxy_pids


def test_a_stopped_stack_leaves_nothing_behind(stack: Stack) -> None:
    assert haproxy_pids(stack.folder)
    stack.stop()

    assert stack.processes() == []
    assert haproxy_pids(stack.folder) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{stack.url}/health")
