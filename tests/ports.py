"""A port for whatever a test starts."""

from __future__ import annotations

from local_stack.commands import free_addresses


def free_port() -> int:
    """A loopback port on which nothing listens, another one each time; no connection takes it meanwhile."""
    return free_addresses(1)[0].port
