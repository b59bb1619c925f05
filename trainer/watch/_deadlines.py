"""How long each phase may last."""

from __future__ import annotations

from trainer.config import TrainerConfig
from trainer.watch._phases import Phase, PhaseStatus

_HOUR = 3600.0
_AFTER_BATCH_TIMEOUT = 600.0
"""The wait for a batch ends by itself, with a message that says more; the watchdog comes long after."""


class Deadlines:
    """Seconds by phase, from section `watchdog`.

    Args:
        config: The configuration.
        is_main_process: Whether this process is the one that fetches and publishes. The others wait for it.
    """

    def __init__(self, config: TrainerConfig, *, is_main_process: bool = True) -> None:
        settings, atropos, publish = config.watchdog, config.atropos, config.publish
        starting = settings.starting_timeout or _HOUR + atropos.ready_timeout + config.journal.farewell
        waiting = settings.waiting_timeout or atropos.batch_timeout + _AFTER_BATCH_TIMEOUT
        requests = publish.load_timeout + publish.verify_timeout + 6 * publish.pause_timeout
        publishing = settings.publishing_timeout or (
            _HOUR + 2 * (publish.ready_timeout + publish.retry_seconds + requests)
        )
        if not is_main_process:  # what process 0 does without the others, they spend waiting for its batch
            waiting += publishing + starting
        self._seconds = {
            Phase.STARTING: starting,
            Phase.WAITING: waiting,
            Phase.PREPARING: settings.preparing_timeout,
            Phase.TRAINING: settings.training_timeout,
            Phase.PUBLISHING: publishing,
            Phase.CHECKPOINTING: settings.checkpointing_timeout,
            Phase.STOPPING: settings.stopping_timeout,
        }

    @property
    def shortest(self) -> float:
        """The shortest of all."""
        return min(self._seconds.values())

    def of(self, phase: Phase) -> float:
        """Seconds that the phase may last."""
        return self._seconds[phase]

    def is_past(self, status: PhaseStatus) -> bool:
        """Whether it has lasted longer than it may."""
        return status.seconds() > self.of(status.phase)
