"""Notes what the training thread is doing, since when, and whom it waits for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from atropos_client.clock import running_time
from trainer.config import TrainerConfig

_HOUR = 3600.0
_AFTER_BATCH_TIMEOUT = 600.0
"""The wait for a batch ends by itself, with a message that says more; the watchdog comes long after."""


class RunPhase(StrEnum):
    """A phase of the training thread; each has its deadline in section `watchdog`."""

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

    phase: RunPhase
    party: str
    """The party that is waited for, in words."""
    details: Callable[[], str] | None
    """Says more, and may take its time over it."""
    since: float
    """On the clock of `running_time`; time spent in inner phases does not count."""
    serial: int
    """Differs between any two entries."""

    def seconds(self) -> float:
        """Seconds that it has lasted, without the time in which the process stood still."""
        return running_time() - self.since

    def is_overdue(self, deadlines: Mapping[RunPhase, float]) -> bool:
        """Whether it has lasted longer than it may."""
        return self.seconds() > deadlines[self.phase]

    def describe(self) -> str:
        """Name the party that is waited for, with what it last said."""
        return f"{self.party}: {self.details()}" if self.details is not None else self.party


@dataclass(frozen=True, kw_only=True)
class RunCounts:
    """Counts of the steps and batches of a run."""

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
        self._status = self._new(RunPhase.STARTING, "the model to be loaded", None)
        self._last_batch_at: float | None = None
        self.counts = RunCounts()
        """Steps and batches so far."""
        self.started = False
        """Whether the run asks for batches."""
        self.stopping = False
        """Whether the run is to end, or ends."""
        self.processes = 1
        """Number of processes that train together."""
        self.silent_processes: Callable[[], Mapping[int, float]] = dict
        """Gives the ranks from which nothing is heard, with the seconds of it, at once."""
        self.served_version: Callable[[], int | None] = lambda: None
        """Gives the version that is proven to be served, at once; None: not known."""

    @property
    def status(self) -> PhaseStatus:
        """The present phase."""
        return self._status

    @property
    def last_batch_age(self) -> float | None:
        """Seconds since the loop took its last batch; None before the first."""
        taken = self._last_batch_at
        return None if taken is None else time.monotonic() - taken

    def begin(self, phase: RunPhase, party: str) -> None:
        """Be in a phase until another one begins; for what lies between the others."""
        if phase is RunPhase.STOPPING:
            self.stopping = True
        elif phase is not RunPhase.STARTING:
            self.started = True
        self._status = self._new(phase, party, None)

    @contextmanager
    def phase(self, phase: RunPhase, party: str, details: Callable[[], str] | None = None) -> Iterator[None]:
        """Be in a phase, and then in the outer one again, whose clock has stood still meanwhile.

        Args:
            phase: The phase.
            party: Who is waited for.
            details: Asked, in another thread, what they last said; when it is too late.
        """
        outer = self._status
        inner = self._status = self._new(phase, party, details)
        try:
            yield
        finally:
            spent = running_time() - inner.since
            self._status = replace(outer, since=outer.since + spent, serial=next(self._serials))

    def note_batch(self) -> None:
        """A batch was taken."""
        self._last_batch_at = time.monotonic()

    def _new(self, phase: RunPhase, party: str, details: Callable[[], str] | None) -> PhaseStatus:
        return PhaseStatus(
            phase=phase,
            party=party,
            details=details,
            since=running_time(),
            serial=next(self._serials),
        )


def phase_deadlines(config: TrainerConfig, *, is_main_process: bool = True) -> dict[RunPhase, float]:
    """Seconds that each phase may last, from section `watchdog`.

    Args:
        config: The configuration.
        is_main_process: Whether this process is the one that fetches and publishes. The others wait for it.
    """
    settings, atropos, publish = config.watchdog, config.atropos, config.publish
    starting = settings.starting_timeout or _HOUR + atropos.ready_timeout + config.journal.shutdown_timeout
    waiting = settings.waiting_timeout or atropos.batch_timeout + _AFTER_BATCH_TIMEOUT
    requests = publish.load_timeout + publish.verify_timeout + 6 * publish.pause_timeout
    publishing = settings.publishing_timeout or (
        _HOUR + 2 * (publish.ready_timeout + publish.retry_seconds + requests)
    )
    if not is_main_process:  # what process 0 does without the others, they spend waiting for its batch
        waiting += publishing + starting + settings.checkpointing_timeout
    return {
        RunPhase.STARTING: starting,
        RunPhase.WAITING: waiting,
        RunPhase.PREPARING: settings.preparing_timeout,
        RunPhase.TRAINING: settings.training_timeout,
        RunPhase.PUBLISHING: publishing,
        RunPhase.CHECKPOINTING: settings.checkpointing_timeout,
        RunPhase.STOPPING: settings.stopping_timeout,
    }
