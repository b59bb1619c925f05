"""Finds what a run goes on from, and refuses a start that could not go on.

All of it is asked before anything in the run's directory is changed; `run` and `check` ask the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from atropos_client.journal import LOCK_NAME, Journal
from trainer.checkpoints.format import Checkpoint, read_checkpoint, verify_checkpoint
from trainer.checkpoints.retention import (
    checkpoint_path,
    find_newest_whole,
    list_checkpoints,
    recover_checkpoints,
    set_aside_damaged,
)
from trainer.config import TrainerConfig, refuse_changed_settings
from trainer.errors import CheckpointError, ConfigurationError, DamagedCheckpoint
from trainer.export.atomic_directory import remove_leftovers, restore_replaced
from trainer.run.places import checkpoint_directory, journal_directory, require_places
from trainer.run.processes import from_process_0

logger = logging.getLogger(__name__)

Accept = Callable[[TrainerConfig, Checkpoint | None], None]
"""Asked whether the batches go on from a checkpoint (None: from the beginning); raises if they do not."""

_NONE = -1
"""Told by process 0 to the others instead of a checkpoint's step."""


def accept_any(config: TrainerConfig, checkpoint: Checkpoint | None) -> None:
    """For batches that go on from any checkpoint."""


def accept_journal(config: TrainerConfig, checkpoint: Checkpoint | None) -> None:
    """See that the journal, if there is to be one, goes on from the checkpoint.

    Raises:
        JournalError: It does not, or is damaged.
    """
    if config.journal.enabled:
        Journal.require_usable(
            journal_directory(config),
            after=checkpoint.state.batches if checkpoint is not None else 0,
            accept_loss=config.journal.accept_loss,
        )


def look_at_start(config: TrainerConfig) -> tuple[Checkpoint | None, list[DamagedCheckpoint]]:
    """See, without reading all of it, what a run on the Atropos API would go on from.

    Returns:
        The checkpoint, and what is wrong with newer ones that would be set aside.

    Raises:
        TrainerError, JournalError: The run would refuse to start.
    """
    require_places(config)
    if (journal_directory(config) / LOCK_NAME).exists():
        Journal.take_lock(journal_directory(config)).release()
    checkpoint, damaged = _select(config, accept_journal, read_checkpoint)
    return checkpoint, list(damaged.values())


def find_checkpoint(config: TrainerConfig, accelerator: Accelerator, accept: Accept) -> Checkpoint | None:
    """Find what the run goes on from: the newest checkpoint of which every byte is what was written.

    Process 0 looks, and puts in order what an earlier process left once it is known that the run can start;
    the others take what it found.

    Args:
        config: The configuration.
        accelerator: Accelerate's view of the processes.
        accept: Whether the batches go on from there.

    Raises:
        ConfigurationError: There is something, and `train.resume` forbids to use it, or these settings do
            not go with it.
        CheckpointError: See `find_newest_whole`.
    """
    if accelerator.num_processes == 1:
        return _find_checkpoint(config, accept)
    checkpoint: Checkpoint | None = None

    def find() -> int:
        nonlocal checkpoint
        checkpoint = _find_checkpoint(config, accept)
        return _NONE if checkpoint is None else checkpoint.state.step

    step = from_process_0(accelerator, find, failed="cannot start or go on here")
    if checkpoint is None and step != _NONE:
        path = checkpoint_path(checkpoint_directory(config), step)
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint as error:
            raise CheckpointError(f"process 0 found {path} whole, this process does not: {error}") from error
    return checkpoint


def _find_checkpoint(config: TrainerConfig, accept: Accept) -> Checkpoint | None:
    recover_checkpoints(checkpoint_directory(config))
    checkpoint, damaged = _select(config, accept, verify_checkpoint)
    if checkpoint is not None:
        set_aside_damaged(damaged, instead=checkpoint)
        logger.info("Going on from checkpoint %s", checkpoint.path)
    final = config.train.output_dir / "final"
    restore_replaced(final)
    remove_leftovers(final)
    return checkpoint


def _select(
    config: TrainerConfig, accept: Accept, read: Callable[..., Checkpoint]
) -> tuple[Checkpoint | None, dict[Path, DamagedCheckpoint]]:
    """Select the checkpoint, and see that the run may go on from it and can; changes nothing."""
    directory = checkpoint_directory(config)
    existing = list_checkpoints(directory)
    if existing and config.train.resume == "never":
        raise ConfigurationError(
            f"{config.train.output_dir} holds a run already ({existing[-1].name}) and train.resume is never; "
            "choose another train.output_dir, or train.resume auto to go on with it"
        )
    checkpoint, damaged = find_newest_whole(directory, read)
    if checkpoint is not None:
        stored = checkpoint.manifest.configuration
        refuse_changed_settings(stored, config, checkpoint=checkpoint.path.name)
    accept(config, checkpoint)
    return checkpoint, damaged
