"""A request to end the run, as any process may get it, and how long a step under way may go on after it."""

from __future__ import annotations

import time

from trainer.monitoring import Progress
from trainer.run.processes import JoinedRun


class StopRequest:
    """Whether this process was asked to end the run.

    Args:
        joined: The processes of the run.
        grace: Seconds that a step may still take; see `checkpoint.grace`.
        progress: Where the request is noted.
    """

    def __init__(self, joined: JoinedRun, *, grace: float, progress: Progress) -> None:
        self._joined = joined
        self._grace = grace
        self._progress = progress
        self._asked_at = 0.0
        self.reason: str | None = None
        """Why; None as long as nobody asked."""

    @property
    def asked(self) -> bool:
        """Whether somebody asked."""
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Note the request; safe from any thread and from a signal handler."""
        self._asked_at = time.monotonic()
        self.reason = reason
        self._progress.stopping = True

    def grace_is_over(self) -> bool:
        """Whether the step under way is to be given up; all processes ask, and get one answer."""
        return self._joined.any(self.asked and time.monotonic() - self._asked_at >= self._grace)
