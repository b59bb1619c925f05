"""A port for whatever a test starts."""

from __future__ import annotations

from local_stack.commands import free_addresses

_GIVEN: set[int] = set()


def free_port() -> int:
    """A loopback port on which nothing listens, another one each time; no connection takes it meanwhile."""
    while (port := free_addresses(1)[0].port) in _GIVEN:
        pass  # whoever has it may not listen yet
    _GIVEN.add(port)
    return port
