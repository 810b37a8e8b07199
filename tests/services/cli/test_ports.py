import socket

import pytest

from services.cli.ports import PortInUseError, find_free_ports, require_free


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = find_free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_taken_port_is_refused_by_name() -> None:
    (port,) = find_free_ports(1)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(PortInUseError, match=rf"port {port} \(router\)"),
    ):
        require_free(port, "router")
    require_free(port, "router")
