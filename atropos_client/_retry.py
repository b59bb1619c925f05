"""Sends a request again where that is safe: pure functions on an error and the policy decide.

The rule behind all of it: a request that may have changed something on the server is repeated only if it was
certainly never sent.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from atropos_client.backoff import Backoff
from atropos_client.clock import running_time
from atropos_client.errors import (
    ApiUnreachable,
    AtroposClientError,
    ConnectionLost,
    ErrorStatus,
    ReplyTimeout,
)

T = TypeVar("T")

TRANSIENT_STATUSES = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses by which proxies and overloaded servers say "later".

500 is not among them: the API answers 500 to requests that fail every time, such as the status of an
environment that it does not know."""


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

    def allows_another(self, attempts: int, elapsed: float) -> bool:
        """Whether a further sending is within the bounds.

        Args:
            attempts: Sendings so far.
            elapsed: Seconds between the start of the first sending and that of the coming one.
        """
        return attempts < self.attempts and elapsed <= self.wall_clock


NO_RETRIES = RetryPolicy(attempts=1)
"""Send once."""


def is_transient(error: AtroposClientError) -> bool:
    """Whether the same request may well succeed a little later."""
    if isinstance(error, ErrorStatus):
        return error.status_code in TRANSIENT_STATUSES
    return isinstance(error, ApiUnreachable | ReplyTimeout | ConnectionLost)


def may_resend(error: AtroposClientError, *, once: bool) -> bool:
    """Whether a request that failed like this may and should be sent again.

    Args:
        error: Why the last sending failed.
        once: Whether a second sending does harm, e.g. removes a second batch.
    """
    return isinstance(error, ApiUnreachable) if once else is_transient(error)


def send_within(
    policy: RetryPolicy,
    send: Callable[[], T],
    *,
    once: bool = False,
    before_pause: Callable[[AtroposClientError], None] = lambda _error: None,
) -> T:
    """Send a request, repeating it within the policy where that is safe.

    Args:
        policy: Bounds on repeating.
        send: Sends it once.
        once: Whether a second sending does harm: then only what was certainly never sent is repeated.
        before_pause: Told of every failure that is not the last.

    Raises:
        AtroposClientError: Whatever the last sending failed of.
    """
    started = running_time()
    pauses = Backoff(first=policy.first_pause, longest=policy.longest_pause)
    for attempts in itertools.count(1):
        try:
            return send()
        except AtroposClientError as error:
            pause = pauses.next()
            elapsed = running_time() - started
            if not policy.allows_another(attempts, elapsed + pause) or not may_resend(error, once=once):
                raise
            before_pause(error)
        time.sleep(pause)
    raise AssertionError("counting does not end")
