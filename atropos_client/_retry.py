"""Whether and when to send a request again: pure functions on an error and the policy.

The rule behind all of it: a request that may have changed something on the server is repeated only if it was
certainly never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from atropos_client.errors import (
    ApiUnreachable,
    AtroposClientError,
    ConnectionLost,
    ErrorStatus,
    ReplyTimeout,
)

TRANSIENT_STATUSES = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses by which proxies and overloaded servers say "later".

500 is not among them: the API answers 500 to requests that fail every time, such as the status of an
environment that it does not know."""


class Resend(Enum):
    """What a second sending of the same request would do."""

    HARMLESS = "harmless"
    """Reads, and writes that change nothing the second time."""

    ONLY_IF_NOT_SENT = "only if not sent"
    """It would remove a second batch, or store a group twice."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Bounds on repeating one request; whichever is reached first ends it, and the last error is raised."""

    attempts: int = 4
    """Sendings in all, the first included. 1: never repeat."""

    wall_clock: float = 30.0
    """Seconds from the first sending after which no further one starts. A restart of the API takes a few."""

    first_pause: float = 0.2
    """Seconds before the second sending; doubles each time."""

    longest_pause: float = 5.0
    """Seconds that a pause never exceeds."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, found {self.attempts}")
        for name in ("wall_clock", "first_pause", "longest_pause"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 seconds or more, found {getattr(self, name)}")


NO_RETRIES = RetryPolicy(attempts=1)
"""Send once."""


def is_transient(error: AtroposClientError) -> bool:
    """Whether the same request may well succeed a little later."""
    if isinstance(error, ErrorStatus):
        return error.status_code in TRANSIENT_STATUSES
    return isinstance(error, ApiUnreachable | ReplyTimeout | ConnectionLost)


def should_retry(
    error: AtroposClientError,
    *,
    resend: Resend,
    attempts_made: int,
    elapsed: float,
    pause: float,
    policy: RetryPolicy,
) -> bool:
    """Decide whether to send a request again.

    Args:
        error: Why the last sending failed.
        resend: What a second sending would do.
        attempts_made: Sendings so far, at least 1.
        elapsed: Seconds since the first sending started.
        pause: Seconds that we would wait before the next one.
        policy: The bounds.

    Returns:
        True if the request may and should be sent again.
    """
    if attempts_made >= policy.attempts or elapsed + pause > policy.wall_clock:
        return False
    if resend is Resend.ONLY_IF_NOT_SENT:
        return isinstance(error, ApiUnreachable)
    return is_transient(error)


def pause_before_attempt(attempt: int, policy: RetryPolicy, *, fraction: float) -> float:
    """Return the seconds to wait before a sending.

    Args:
        attempt: Number of the coming sending, from 2.
        policy: The bounds.
        fraction: A random number in [0, 1); half of each pause is random, so that clients that failed
            together do not come back together.
    """
    # Bounded exponent: 2.0 ** 2000 overflows.
    full = min(policy.longest_pause, policy.first_pause * 2.0 ** min(attempt - 2, 32))
    return full * (0.5 + 0.5 * fraction)
