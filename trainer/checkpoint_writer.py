"""What a run saves: its checkpoints while it lasts, and the finished model.

How a checkpoint lies on the disk: `trainer.checkpoint`. Which of several is kept: `trainer.checkpoint_store`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from trainer.checkpoint import (
    RunState,
    collect_random_states,
    numpy_random_state,
    python_random_state,
    read_checkpoint,
    trained_parameter_names,
    write_checkpoint,
)
from trainer.checkpoint_store import checkpoint_path, list_checkpoints, prune_checkpoints
from trainer.config import TrainerConfig
from trainer.errors import CheckpointError
from trainer.model_directory import write_model_directory
from trainer.outcomes import Outcomes
from trainer.setup import Prepared, checkpoint_directory, library_versions
from trainer.sources import BatchLedger
from trainer.watch import Phase, Progress

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run, and the model that it ends with.

    Args:
        config: The run's configuration.
        prepared: What is saved, and the checkpoint that the run goes on from.
        outcomes: What a checkpoint counts.
        ledger: Lets go of the bodies that no checkpoint needs any more. None: there is none.
        progress: Where the phase is noted.
        disk: Who is waited for meanwhile, for logs.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: Prepared,
        outcomes: Outcomes,
        *,
        ledger: BatchLedger | None,
        progress: Progress,
        disk: str,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._accelerator = prepared.accelerator
        self._outcomes = outcomes
        self._ledger = ledger
        self._progress = progress
        self._disk = disk
        self._directory = checkpoint_directory(config)
        self._step = prepared.state.step if prepared.state else -1
        self._settled_batch = outcomes.settled_batch
        # Of what is loaded: the environment on the disk may change, or go, while a run lasts.
        self._versions = library_versions()

    @property
    def has_current_step(self) -> bool:
        """Whether the newest checkpoint is of the current step."""
        return self._step == self._outcomes.step

    @property
    def newest(self) -> Path:
        """The newest checkpoint; there is one once the run has begun."""
        return checkpoint_path(self._directory, self._step)

    def write(self) -> None:
        """Write a checkpoint of the current step, on process 0, and delete the oldest.

        Raises:
            CheckpointError: It cannot be written.
        """
        with self._progress.phase(Phase.CHECKPOINTING, self._disk):
            self._write()

    def save_what_there_is(self, *, weights_whole: bool) -> None:
        """After a failure: a checkpoint of the last whole step, if this process can write one alone.

        Args:
            weights_whole: Whether the weights are those of a step, none being under way.
        """
        step = self._outcomes.step
        if (step, self._outcomes.settled_batch) == (self._step, self._settled_batch):
            return
        if not weights_whole or self._accelerator.num_processes > 1:
            logger.warning("No checkpoint of step %d: it cannot be written now", step)
            return
        try:
            self.write()
        except CheckpointError:  # the failure under way matters more than this one
            logger.exception("No checkpoint of step %d", step)

    def write_final_model(self) -> Path:
        """Write the finished model, on process 0.

        Raises:
            CheckpointError: It cannot be written.
        """
        path = self._config.train.output_dir / "final"
        if self._accelerator.is_main_process:
            write_model_directory(
                path,
                model=self._prepared.policy.model,
                tokenizer=self._prepared.policy.tokenizer,
                dtype=self._prepared.policy.stored_dtype,
                replace=True,
            )
        return path

    def _write(self) -> None:
        random_states = collect_random_states(self._accelerator.gather)
        if self._accelerator.is_main_process:
            write_checkpoint(
                checkpoint_path(self._directory, self._outcomes.step),
                model=self._prepared.policy.model,
                tokenizer=self._prepared.policy.tokenizer,
                optimizer=self._prepared.optimizer,
                random_states=random_states,
                state=self._state(),
                configuration=self._config.model_dump(mode="json"),
                versions=self._versions,
            )
            settings = self._config.checkpoint
            prune_checkpoints(self._directory, keep=settings.keep, keep_every=settings.keep_every)
            self._prune_ledger()
        self._step = self._outcomes.step
        self._settled_batch = self._outcomes.settled_batch
        self._accelerator.wait_for_everyone()

    def _prune_ledger(self) -> None:
        """Let go of the bodies that no checkpoint needs any more."""
        if self._ledger is None or not self._config.journal.prune:
            return
        try:
            oldest = read_checkpoint(list_checkpoints(self._directory)[0])
        except CheckpointError as error:  # half deleted when an earlier process died; gone after the next one
            logger.warning("No body is deleted from the journal: %s", error)
            return
        self._ledger.prune(oldest.state.batches)

    def _state(self) -> RunState:
        outcomes = self._outcomes
        return RunState(
            step=outcomes.step,
            policy_version=outcomes.step,
            batches=outcomes.settled_batch,
            counters=outcomes.settled_counters,
            normalizer=outcomes.normalizer,
            stored_dtype=str(self._prepared.policy.stored_dtype).removeprefix("torch."),
            parameter_names=trained_parameter_names(self._prepared.policy.model),
            python_random=python_random_state(),
            numpy_random=numpy_random_state(),
            set_aside_window=outcomes.settled_share,
        )
