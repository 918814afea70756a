from __future__ import annotations

import socket

import pytest

from sensor_pipeline.embedded import ports
from sensor_pipeline.errors import UnavailableError


def listener() -> socket.socket:
    server = socket.create_server((ports.LOOPBACK, 0))
    server.listen()
    return server


def test_the_preferred_port_is_used_when_it_is_free() -> None:
    port = ports.any_free()
    assert ports.next_free(port) == port


def test_a_port_that_someone_listens_on_is_passed_over() -> None:
    with listener() as server:
        port = server.getsockname()[1]
        assert not ports.is_free(port)
        assert ports.next_free(port) > port


def test_a_listener_on_all_addresses_takes_the_loopback_port_too() -> None:
    with socket.create_server(("", 0)) as server:
        assert not ports.is_free(server.getsockname()[1])


def test_a_port_is_free_again_once_its_server_has_closed_although_connections_linger() -> None:
    with listener() as server:
        port = server.getsockname()[1]
        with socket.create_connection((ports.LOOPBACK, port)):
            server.accept()[0].close()  # the side that closes first keeps the port in TIME_WAIT
    assert ports.is_free(port)


def test_when_no_port_is_left_the_error_says_so() -> None:
    with (
        socket.create_server((ports.LOOPBACK, 65535)),
        pytest.raises(UnavailableError, match="no free port from 65535"),
    ):
        ports.next_free(65535)
