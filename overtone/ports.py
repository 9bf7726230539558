"""TCP ports of the loopback address for servers that are about to start."""

import random
import socket
from collections.abc import Iterable, Mapping

from overtone.errors import EnvironmentProblemError

LOOPBACK = "127.0.0.1"

_RANGE = range(20_000, 30_000)
"""Above those that Ray gives to its workers (10,002 to 19,999) and below those that Linux (32,768 on) and macOS (49,152
on) give to connections that go out: one of these may be taken between the choice and the start of the server."""

_given: set[int] = set()
"""By this process: what was chosen before may not be bound yet by the server it is for."""


def free_ports(count: int, prefer: Mapping[int, int] | None = None) -> list[int]:
    """`count` different ports that are free now; `prefer` names a wish for some of them by index.

    One that this process was given before comes again only as a wish, or when no other is left.

    Raises:
        EnvironmentProblemError: there are not so many.
    """
    candidates = iter(sorted(random.sample(_RANGE, len(_RANGE)), key=_given.__contains__))
    held: list[socket.socket] = []
    try:
        for index in range(count):
            wish = (prefer or {}).get(index)
            held.append((wish and _bound(wish)) or _first_bound(candidates))
        ports = [int(each.getsockname()[1]) for each in held]
        _given.update(ports)
        return ports
    finally:
        for each in held:
            each.close()


def _first_bound(ports: Iterable[int]) -> socket.socket:
    for port in ports:
        if probe := _bound(port):
            return probe
    raise EnvironmentProblemError("No free TCP port is left on loopback.")


def _bound(port: int) -> socket.socket | None:
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        probe.bind((LOOPBACK, port))
    except OSError:
        probe.close()
        return None
    return probe
