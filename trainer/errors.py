"""Errors of the trainer, as one tree.

::

    TrainerError (Exception)
    ├── ConfigurationError (ValueError)     a wrong key or value, found before anything runs
    ├── DataError (ValueError)              a batch or a group that cannot be trained on
    │   └── MissingLogProbsError            the loss needs log-probs that the environment did not send
    ├── ShapeMismatchError (ValueError)     tensors that must have one shape have several
    ├── CheckpointError (OSError)           a checkpoint that cannot be written or read
    │   └── DamagedCheckpoint               it is not what was written; the one before it may be whole
    ├── MetricsError (OSError)              a row of metrics that cannot be written
    ├── TooManySkippedBatches               too many batches in a row that could not be trained
    ├── TooManySetAside                     too large a share of the groups could not be trained
    ├── MismatchTooLarge                    sampler and trainer disagree about what was sampled
    ├── AnotherProcessFailed                another process of the run ended, or says that it cannot go on
    ├── DeadlineExceeded (TimeoutError)     a party we waited for did not answer in time
    └── PublishError                        see trainer.publish
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base class of everything that the trainer raises on purpose."""


class ConfigurationError(TrainerError, ValueError):
    """A configuration key or value is wrong; the message names the field and what is allowed."""


class DataError(TrainerError, ValueError):
    """A batch or a group cannot be trained on; the message says which and why."""


class MissingLogProbsError(DataError):
    """The chosen loss needs per-token log-probs of the sampler and the group does not carry them."""


class ShapeMismatchError(TrainerError, ValueError):
    """Tensors that must share one shape do not; the message lists every shape."""


class CheckpointError(TrainerError, OSError):
    """A checkpoint could not be written, read, or trusted."""


class DamagedCheckpoint(CheckpointError):  # noqa: N818 - reads as what was found
    """A checkpoint on the disk is not what was written; the message names the file and the reason."""


class MetricsError(TrainerError, OSError):
    """A row of metrics could not be written, because the disk is full, say."""


class TooManySkippedBatches(TrainerError):  # noqa: N818 - reads as the event that it is
    """Too many batches in a row could not be trained: nothing usable, no signal, or a loss not finite."""


class TooManySetAside(TrainerError):  # noqa: N818
    """Too large a share of the groups of the last batches was set aside; the message names the reasons."""


class MismatchTooLarge(TrainerError):  # noqa: N818
    """The sampler's log-probs of a batch are far from the trainer's, though both have the same weights."""


class AnotherProcessFailed(TrainerError):  # noqa: N818
    """Another process of the run ended or failed; what it said itself is the cause.

    Args:
        message: Which one, and of what.
        told: Whether another process says so, so that this one need not.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class DeadlineExceeded(TrainerError, TimeoutError):  # noqa: N818 - reads as the event that it is
    """A party that the trainer waited for did not answer in time; the message names it."""
