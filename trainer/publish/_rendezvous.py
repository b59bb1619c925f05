"""Ports on which the trainer waits for servers' workers to join a process group."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

import httpx

from trainer.config import PublishSettings
from trainer.publish.errors import ConnectFailed, Phase

PORT_ATTEMPTS = 8
"""A rendezvous that nobody came to keeps its port for some minutes; the next attempts step over it."""


class RendezvousPorts:
    """Gives each server ports of its own, from `publish.group_port` on.

    Args:
        settings: Section `publish` of the configuration.
    """

    def __init__(self, settings: PublishSettings) -> None:
        self._address = settings.group_address
        self._first = settings.group_port
        self._numbers = {plain_url(url): number for number, url in enumerate(settings.servers)}

    def free(self, server: str) -> int:
        """A free port: the server's own, or the next that is no other server's.

        Raises:
            ConnectFailed: None can be had.
        """
        step = max(1, len(self._numbers))
        first = self._first + self._numbers.setdefault(server, len(self._numbers))
        ports = [first + attempt * step for attempt in range(PORT_ATTEMPTS)]
        for port in ports:
            if self._is_free(port, server):
                return port
        raise ConnectFailed(
            f"the ports {_listed(ports)} for the rendezvous are all taken; set another publish.group_port",
            server=server,
            phase=Phase.CONNECT,
        )

    def _is_free(self, port: int, server: str) -> bool:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self._address, port))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                return False
            raise ConnectFailed(
                f"cannot listen on {self._address}:{port} for its workers ({error}); publish.group_address "
                "has to be an address of this machine",
                server=server,
                phase=Phase.CONNECT,
            ) from error
        return True


def plain_url(url: str) -> str:
    """A URL as messages show it and as servers are known by: without credentials."""
    return str(httpx.URL(url).copy_with(username=None, password=None)).rstrip("/")


def _listed(ports: Sequence[int]) -> str:
    return ", ".join(map(str, ports))
