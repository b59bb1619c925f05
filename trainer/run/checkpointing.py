"""Saves a run: its checkpoints while it lasts, and the finished model.

How a checkpoint lies on the disk: `trainer.checkpoints.format`; which of several is kept:
`trainer.checkpoints.retention`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from atropos_client.journal import Journal
from trainer.checkpoints.format import (
    CheckpointState,
    read_checkpoint,
    trained_parameter_names,
    write_checkpoint,
)
from trainer.checkpoints.retention import checkpoint_path, list_checkpoints, prune_checkpoints
from trainer.config import TrainerConfig
from trainer.errors import CheckpointError
from trainer.export.hf_model import write_model_directory
from trainer.model.weight_stream import WeightStream, dtype_name
from trainer.monitoring import Progress, RunPhase
from trainer.run.batch_tracker import BatchTracker
from trainer.run.orders import Order, together
from trainer.run.places import checkpoint_directory
from trainer.run.train_state import PreparedRun, library_versions

logger = logging.getLogger(__name__)


def write_checkpoint_files(
    config: TrainerConfig, prepared: PreparedRun, state: CheckpointState, versions: Mapping[str, str]
) -> None:
    """Write a checkpoint; or, where weights are spread over processes, this one's part of it.

    Args:
        config: The run's configuration.
        prepared: What is saved.
        state: That of process 0 is written; the others give the same step and parameters.
        versions: Of libraries.

    Raises:
        CheckpointError: It cannot be written, by this process or another.
    """
    write_checkpoint(
        checkpoint_path(checkpoint_directory(config), state.step),
        model=prepared.policy.model,
        base=prepared.policy.base,
        optimizer=prepared.optimizer,
        state=state,
        configuration=config.model_dump(mode="json"),
        versions=versions,
        spread=prepared.spread,
    )


def write_final_model(config: TrainerConfig, prepared: PreparedRun) -> Path:
    """Write the finished model; or, where weights are spread over processes, this one's part of it.

    Raises:
        CheckpointError: It cannot be written, by this process or another.
    """
    path = config.train.output_dir / "final"
    policy, spread = prepared.policy, prepared.spread
    spread.settle(policy.model)
    write_model_directory(path, WeightStream(policy.model, policy.base, spread=spread), replace=True)
    return path


class CheckpointWriter:
    """Writes the checkpoints of a run, and the model that it ends with.

    Args:
        config: The run's configuration.
        prepared: What is saved, and the checkpoint that the run goes on from.
        tracker: What a checkpoint counts.
        ledger: Lets go of the bodies that no checkpoint needs any more. None: there is none.
        progress: Where the phase is noted.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: PreparedRun,
        tracker: BatchTracker,
        *,
        ledger: Journal | None,
        progress: Progress,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._tracker = tracker
        self._ledger = ledger
        self._progress = progress
        self._disk = f"the disk of {config.train.output_dir}"
        self._directory = checkpoint_directory(config)
        self._step = prepared.state.step if prepared.checkpoint is not None else -1
        self._settled_batch = tracker.settled.batches
        # Of what is loaded: the environment on the disk may change, or go, while a run lasts.
        self._versions = library_versions()

    @property
    def has_current_step(self) -> bool:
        """Whether the newest checkpoint is of the current step."""
        return self._step == self._tracker.step

    @property
    def newest(self) -> Path:
        """The newest checkpoint; there is one once the run has begun."""
        return checkpoint_path(self._directory, self._step)

    def write(self) -> None:
        """Write a checkpoint of the current step, and delete the oldest.

        Where weights are spread over processes, all of them write.

        Raises:
            CheckpointError: It cannot be written.
            AnotherProcessFailed: Another process is gone.
        """
        with self._progress.phase(RunPhase.CHECKPOINTING, self._disk):
            state = self._state()  # what fails here fails before the others wait for it
            with together(self._prepared.joined, Order.CHECKPOINT, self._tracker.step):
                self._write(state)

    def save_last_whole_step(self, *, weights_whole: bool, others_listen: bool) -> None:
        """After a failure: a checkpoint of the last whole step.

        Whatever became of the other processes, unless weights are spread over them.

        Args:
            weights_whole: Whether the weights are those after a whole step.
            others_listen: Whether the others wait for an order.
        """
        step = self._tracker.step
        if (step, self._tracker.settled.batches) == (self._step, self._settled_batch):
            return
        if not weights_whole:
            logger.warning("No checkpoint of step %d: the failure came while its weights were changed", step)
            return
        try:
            if not self._prepared.spread.sharded:
                with self._progress.phase(RunPhase.CHECKPOINTING, self._disk):
                    self._write(self._state())
            elif others_listen:
                self.write()
            else:
                logger.warning("No checkpoint of step %d: processes that hold parts of it have ended", step)
        except Exception as error:  # noqa: BLE001 - a broken GPU, say; the failure under way matters more
            logger.error("No checkpoint of step %d: %s", step, error)  # noqa: TRY400

    def write_final_model(self) -> Path:
        """Write the finished model; where weights are spread over processes, all of them write.

        Raises:
            CheckpointError: It cannot be written.
            AnotherProcessFailed: Another process is gone.
        """
        with together(self._prepared.joined, Order.FINAL):
            return write_final_model(self._config, self._prepared)

    def _write(self, state: CheckpointState) -> None:
        write_checkpoint_files(self._config, self._prepared, state, self._versions)
        settings = self._config.checkpoint
        prune_checkpoints(self._directory, keep=settings.keep, keep_every=settings.keep_every)
        self._prune_ledger()
        self._step = state.step
        self._settled_batch = self._tracker.settled.batches

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

    def _state(self) -> CheckpointState:
        tracker = self._tracker
        return CheckpointState(
            step=tracker.step,
            policy_version=tracker.step,
            **vars(tracker.settled),
            normalizer=tracker.normalizer,
            entropy_bonus=self._prepared.entropy_bonus.state,
            stored_dtype=dtype_name(self._prepared.policy.base.dtype),
            parameter_names=trained_parameter_names(self._prepared.policy.model),
            base_weights=self._prepared.policy.base_weights,
        )
