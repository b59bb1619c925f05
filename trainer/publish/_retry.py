"""When a request to an inference server may be sent again: pure decisions, no waiting, no I/O."""

from __future__ import annotations

from enum import Enum, auto
from http import HTTPStatus

MAX_ATTEMPTS = 4
"""Outside start-up. With the waits below that bridges about two seconds: a dropped connection or a proxy
that reloads, not a server that is gone."""

PASSING_STATUSES = frozenset(
    {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
)
"""A server that is not ready says 503; a proxy in front of one that is starting says 502 or 504."""

MAX_WAIT = 2.0
"""Seconds between two attempts, at most; a server that starts takes minutes, so this costs nothing."""


class Repeatability(Enum):
    """What a second sending of the same request would do."""

    STARTUP = auto()
    """Harmless, and the server may not be up yet: only the deadline bounds the attempts."""
    IDEMPOTENT = auto()
    """The same as the first alone."""
    ONCE = auto()
    """Work or damage. Only repeated if the first certainly never arrived."""


class Fault(Enum):
    """How an attempt failed."""

    NOT_CONNECTED = auto()
    """No connection, so the request was never sent."""
    CONNECTION_LOST = auto()
    """The connection broke after the request may have been sent."""
    TIMED_OUT = auto()
    """No reply in the phase's time."""
    REFUSED = auto()
    """A reply with status 200 that says that the request failed."""


def may_retry(fault: Fault | int, repeatability: Repeatability, attempt: int) -> bool:
    """Whether to send a request again.

    Args:
        fault: How the attempt failed, or the HTTP status of the reply.
        repeatability: What the route allows.
        attempt: Attempts made so far, 1 after the first.
    """
    if fault is Fault.TIMED_OUT:  # the phase's time is spent
        return False
    if repeatability is not Repeatability.STARTUP and attempt >= MAX_ATTEMPTS:
        return False
    if fault is Fault.NOT_CONNECTED:
        return True
    if repeatability is Repeatability.ONCE:
        return False
    return fault is Fault.CONNECTION_LOST or fault in PASSING_STATUSES


def wait_before(attempt: int) -> float:
    """Seconds to wait before attempt number `attempt` + 1: 0.2, 0.4, 0.8, ... up to `MAX_WAIT`."""
    return float(min(0.2 * 2 ** min(attempt - 1, 8), MAX_WAIT))
