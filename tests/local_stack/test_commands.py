"""The ports that the services of the demo listen on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from local_stack import commands
from local_stack.commands import LISTENING_PORTS, free_addresses

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not EPHEMERAL.exists(), reason="only Linux says which ports it gives to connections")
def test_no_connection_is_given_a_port_before_its_service_listens_there() -> None:
    first, last = map(int, EPHEMERAL.read_text().split())
    if first < 32768:
        pytest.skip(
            f"this machine gives ports {first} to {last} to connections, others than Linux does by itself"
        )
    ports = [each.port for each in free_addresses(50)]
    assert len(set(ports)) == 50
    assert set(ports) <= set(LISTENING_PORTS)
    assert not set(ports) & set(range(first, last + 1))


def test_ports_that_somebody_has_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_addresses(2)
    monkeypatch.setattr(commands, "LISTENING_PORTS", [taken.port, free.port])
    with socket.create_server(("127.0.0.1", taken.port)):
        assert {free_addresses(1)[0].port for _ in range(10)} == {free.port}
        with pytest.raises(OSError, match="fewer than 2 ports"):
            free_addresses(2)
