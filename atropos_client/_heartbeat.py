"""Who is late: one line that explains why there is no batch yet.

A run that waits must say for whom. `explain_wait` is a pure function of what is known; `Heartbeat` is the
thread that logs it regularly while somebody is waiting.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from schemas import StatusReply

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WaitFacts:
    """What is known about a wait for data."""

    url: str
    """Address of the API, without credentials."""

    waited: float
    """Seconds since the last batch, or since the start."""

    batch_size: int
    """Sequences that a batch needs."""

    batches: int
    """Batches that have come so far."""

    group_size: float | None
    """Sequences per group in the last batch. None: none came yet."""

    in_flight: float | None
    """Seconds that the current ``GET /batch`` has been waiting for its reply. None: none is under way."""

    trouble: str | None
    """What the last request failed of. None: it did not fail."""

    status: StatusReply | None
    """The API's own numbers. None: not asked, or no answer."""


def explain_wait(facts: WaitFacts) -> str:
    """Say in one line who is late, with numbers and, where there is one, the remedy."""
    since = f"for {facts.waited:.0f} s"
    if facts.trouble is not None:
        return f"no batch {since}: the Atropos API at {facts.url} fails: {facts.trouble}"
    if facts.in_flight is not None and facts.in_flight > 5:
        return (
            f"no batch {since}: the Atropos API at {facts.url} has not answered GET /batch "
            f"for {facts.in_flight:.0f} s (it may be encoding a large batch, or hang)"
        )
    if facts.status is None:
        return f"no batch {since}: the Atropos API at {facts.url} did not tell its status"
    groups = facts.status.queue_size
    if groups == 0 and facts.batches == 0:
        return (
            f"no environment connected {since}, or none has finished a group yet: "
            f"queue 0/{facts.batch_size} sequences at {facts.url}"
        )
    if facts.group_size is None:
        return (
            f"environments are late {since}: queue {groups} groups, "
            f"a batch needs {facts.batch_size} sequences, at {facts.url}"
        )
    sequences = round(groups * facts.group_size)
    line = (
        f"environments are late {since}: queue {sequences}/{facts.batch_size} sequences "
        f"({groups} groups of about {facts.group_size:g}) at {facts.url}"
    )
    if sequences >= facts.batch_size:
        line += (
            "; enough, but the API only serves exactly full batches: "
            "make the batch size a multiple of every environment's group size"
        )
    return line


class Heartbeat:
    """Logs a line at a regular interval while there is something to say."""

    def __init__(self, interval: float, describe: Callable[[], str | None]) -> None:
        """Prepare the thread.

        Args:
            interval: Seconds between two lines.
            describe: Returns the line, or None if nobody is late. Must not raise.
        """
        self._interval = interval
        self._describe = describe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="atropos-heartbeat", daemon=True)

    def start(self) -> None:
        """Start logging."""
        self._thread.start()

    def stop(self) -> None:
        """Stop logging. Does not wait: the thread may be asking a server that hangs, and holds nothing."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            line = self._describe()
            if line is not None and not self._stop.is_set():
                logger.warning("%s", line)
