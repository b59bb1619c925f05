"""What the training thread is doing, since when, and whom it waits for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum


class Phase(StrEnum):
    """What the training thread does; each has its deadline in section `watchdog`."""

    STARTING = "starting"
    """It loads the model and waits for the Atropos API."""
    WAITING = "waiting"
    """It waits for a batch."""
    PREPARING = "preparing"
    """It prepares a batch that was not prepared ahead."""
    TRAINING = "training"
    """It computes an optimizer step."""
    PUBLISHING = "publishing"
    """It publishes weights, or waits for the publish before."""
    CHECKPOINTING = "checkpointing"
    """It writes a checkpoint."""
    STOPPING = "stopping"
    """The run ends."""


@dataclass(frozen=True, kw_only=True)
class PhaseStatus:
    """One entry into a phase. Going back to an outer phase is a new one, with its time so far."""

    phase: Phase
    party: str
    """Who is waited for, in words."""
    details: Callable[[], str] | None
    """Says more, and may take its time over it."""
    since: float
    """On the monotonic clock; time spent in inner phases does not count."""
    serial: int
    """Differs between any two entries."""
    frozen: float = 0.0
    """Seconds of it in which the whole process stood still, stopped by a signal, say."""

    def seconds(self, now: float | None = None) -> float:
        """How long it has lasted, without the time in which the process stood still."""
        return (time.monotonic() if now is None else now) - self.since - self.frozen

    def describe(self) -> str:
        """Who is waited for, with what they last said."""
        return f"{self.party}: {self.details()}" if self.details is not None else self.party


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How far the run has come."""

    step: int = 0
    """Optimizer steps done, which is also the number of batches trained."""
    batches: int = 0
    """Batches whose outcome is known."""
    possibly_lost: int = 0
    """Batches that the API may have handed out and we never got, since this process began."""


class Progress:
    """Written by the training thread, read by any.

    There is no lock: each attribute is replaced as a whole, so that a reader never waits for a writer that is
    stuck.
    """

    def __init__(self) -> None:
        self._serials = itertools.count()
        self._status = self._new(Phase.STARTING, "the model to be loaded", None)
        self._frozen = (-1, 0.0)  # in which entry, and for how many seconds
        self._last_batch_at: float | None = None
        self.facts = Facts()
        """How far the run has come."""
        self.started = False
        """Whether the run asks for batches."""
        self.stopping = False
        """Whether the run is to end, or ends."""
        self.served_version: Callable[[], int | None] = lambda: None
        """Gives the version that is proven to be served, at once; None: not known."""

    @property
    def status(self) -> PhaseStatus:
        """The present phase."""
        status, (serial, seconds) = self._status, self._frozen
        return replace(status, frozen=status.frozen + seconds) if serial == status.serial else status

    @property
    def last_batch_age(self) -> float | None:
        """Seconds since the loop took its last batch; None before the first."""
        taken = self._last_batch_at
        return None if taken is None else time.monotonic() - taken

    def begin(self, phase: Phase, party: str) -> None:
        """Be in a phase until another one begins; for what lies between the others."""
        if phase is Phase.STOPPING:
            self.stopping = True
        elif phase is not Phase.STARTING:
            self.started = True
        self._status = self._new(phase, party, None)

    @contextmanager
    def phase(self, phase: Phase, party: str, details: Callable[[], str] | None = None) -> Iterator[None]:
        """Be in a phase, and then in the outer one again, whose clock has stood still meanwhile.

        Args:
            phase: The phase.
            party: Who is waited for.
            details: Asked, in another thread, what they last said; when it is too late.
        """
        outer = self.status  # with the time in which the process stood still so far
        inner = self._status = self._new(phase, party, details)
        try:
            yield
        finally:
            spent = time.monotonic() - inner.since
            self._status = replace(outer, since=outer.since + spent, serial=next(self._serials))

    def note_batch(self) -> None:
        """A batch was taken."""
        self._last_batch_at = time.monotonic()

    def stood_still(self, seconds: float) -> None:
        """The whole process did, in the present phase; of the watchdog's thread alone."""
        serial, before = self._frozen
        current = self._status.serial
        self._frozen = (current, seconds + (before if serial == current else 0.0))

    def _new(self, phase: Phase, party: str, details: Callable[[], str] | None) -> PhaseStatus:
        return PhaseStatus(
            phase=phase,
            party=party,
            details=details,
            since=time.monotonic(),
            serial=next(self._serials),
        )
