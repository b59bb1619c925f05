"""Chooses the port on which the trainer waits for a server's workers to join a process group."""

from __future__ import annotations

import errno
import socket

from trainer.config import PublishSettings, plain_url
from trainer.publish.errors import Phase
from trainer.publish.interfaces import InferenceServer

PORT_ATTEMPTS = 8
"""A rendezvous that nobody came to keeps its port for some minutes; the next attempts step over it."""


def rendezvous_port(settings: PublishSettings, server: InferenceServer) -> int:
    """Find a free port: the server's own, counted from `publish.group_port`, or the next that is no other's.

    Raises:
        ServerFailure: None can be had.
    """
    address = settings.group_address
    servers = [plain_url(url) for url in settings.servers]
    first = settings.group_port + servers.index(server.url)
    ports = [first + attempt * len(servers) for attempt in range(PORT_ATTEMPTS)]
    for port in ports:
        try:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            raise server.failure(
                Phase.CONNECT,
                f"cannot listen on {address}:{port} for its workers ({error}); publish.group_address has to "
                "be an address of this machine",
            ) from error
        return port
    raise server.failure(
        Phase.CONNECT,
        f"the ports {', '.join(map(str, ports))} for the rendezvous are all taken; set another "
        "publish.group_port",
    )
