"""Ports for servers that start later."""

import socket

import pytest

from overtone.errors import EnvironmentProblemError
from overtone.ports import LOOPBACK, free_ports


def test_they_differ_and_can_be_listened_on() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server((LOOPBACK, port)).close()


def test_none_is_given_to_workers_of_ray_or_to_connections_that_go_out_meanwhile() -> None:
    assert all(19_999 < port < 32_768 for port in free_ports(50))


def test_a_wish_is_kept_where_it_is_free() -> None:
    wish = free_ports(1)[0]
    assert free_ports(3, {1: wish})[1] == wish
    with socket.create_server((LOOPBACK, wish)):
        assert free_ports(3, {1: wish})[1] != wish


def test_more_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = free_ports(1)[0]
    monkeypatch.setattr("overtone.ports._RANGE", range(wish, wish + 1))
    assert free_ports(1) == [wish]
    with pytest.raises(EnvironmentProblemError, match="No free TCP port"):
        free_ports(2)


def test_a_process_is_given_a_port_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overtone.ports._RANGE", range(20_000, 20_200))
    monkeypatch.setattr("overtone.ports._given", set())
    ports = [port for _ in range(40) for port in free_ports(2)]
    assert len(set(ports)) == 80
