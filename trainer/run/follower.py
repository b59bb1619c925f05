"""A process other than 0: it follows what process 0 announces, until the run has ended."""

from __future__ import annotations

import logging
from typing import Final

from trainer.checkpoints.format import trained_parameter_names
from trainer.checkpoints.retention import checkpoint_path
from trainer.config import TrainerConfig
from trainer.errors import AnotherProcessFailed, CheckpointError
from trainer.monitoring import Progress, RunPhase
from trainer.run.checkpointing import write_checkpoint_files, write_final_model
from trainer.run.loop import ASKED_ELSEWHERE, NO_MORE_BATCHES, RunSummary
from trainer.run.optimizer_step import StepAborted, StepRunner
from trainer.run.orders import Order, Outcome, hear, leave_together, taking_part
from trainer.run.places import checkpoint_directory
from trainer.run.publish_part import PublishPart
from trainer.run.step_share import StepShare
from trainer.run.stop_request import StopRequest
from trainer.run.train_state import PreparedRun, library_versions

logger = logging.getLogger(__name__)

PROCESS_0: Final = "process 0"

_PHASES: Final = {
    Order.CAPTURE: RunPhase.PUBLISHING,
    Order.CAPTURE_ADAPTER: RunPhase.PUBLISHING,
    Order.SEND: RunPhase.PUBLISHING,
    Order.SCORE: RunPhase.PUBLISHING,
    Order.CHECKPOINT: RunPhase.CHECKPOINTING,
    Order.FINAL: RunPhase.STOPPING,
}


class Follower:
    """Computes its share of each step, and does its part of what else takes all processes.

    Args:
        config: The run's configuration.
        prepared: See `trainer.run.train_state.prepare_run`.
        steps: Computes the steps.
        progress: Where the present phase is noted, for whoever watches it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: PreparedRun,
        steps: StepRunner,
        *,
        progress: Progress | None = None,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._joined = prepared.joined
        self._steps = steps
        self._publish_part = PublishPart(config, prepared)
        self._progress = progress or Progress()
        self._accelerator = prepared.accelerator
        self._stop = StopRequest(prepared.joined, grace=config.checkpoint.grace, progress=self._progress)
        self.step = prepared.state.step
        """Optimizer steps done."""
        self.starting = True
        """Whether process 0 still waits for servers and the API."""

    def request_stop(self, reason: str) -> None:
        """Ask the whole run to write a checkpoint and end; safe from any thread."""
        self._stop.ask(reason)

    def run(self) -> RunSummary:
        """Follow until process 0 ends the run.

        Raises:
            AnotherProcessFailed: Process 0 has failed, or a process is gone.
            TrainerError: This process failed.
        """
        try:
            outcome = self._follow()
        finally:
            self._joined.release()
        if outcome is Outcome.FAILED:
            raise AnotherProcessFailed(f"{PROCESS_0} has ended the run; its message says why", told=True)
        self._accelerator.end_training()
        done = outcome is Outcome.DONE
        asked = self._stop.reason or ASKED_ELSEWHERE
        early = NO_MORE_BATCHES if outcome is Outcome.OUT_OF_BATCHES else asked
        return RunSummary(
            step=self.step,
            stopped_early=None if done else early,
            final_model=self._config.train.output_dir / "final" if done else None,
            checkpoint=checkpoint_path(checkpoint_directory(self._config), self.step),
            counters={},
        )

    def _follow(self) -> Outcome:
        self._progress.begin(RunPhase.STARTING, PROCESS_0)
        while True:
            with self._progress.phase(RunPhase.WAITING, PROCESS_0):
                heard = hear(self._joined, self._publish_part.require_sent)
            self._publish_part.require_sent()
            if heard.order is Order.STOP:
                leave_together(self._joined)
                return Outcome(heard.value)
            if heard.order is Order.WAIT:
                self.starting = False
                self._joined.any(self._stop.asked)
            elif heard.order is Order.TRAIN:
                self._train(StepShare.from_bytes(heard.payload))
            elif heard.order is Order.SEND:
                with self._progress.phase(_PHASES[heard.order], PROCESS_0):
                    self._publish_part.stream.follow()
            else:
                self._take_part(heard.order, heard.value)

    def _train(self, share: StepShare) -> None:
        self._progress.note_batch()
        with self._progress.phase(RunPhase.TRAINING, f"the computation of step {share.step + 1}"):
            try:
                result = self._steps.compute(share, should_abort=self._stop.grace_is_over)
            except StepAborted:  # process 0 has given it up too
                return
        self.step = share.step + result.applied

    def _take_part(self, order: Order, value: int) -> None:
        """Do what all processes do where weights are spread over them; otherwise process 0 does it alone."""
        with self._progress.phase(_PHASES[order], PROCESS_0):
            try:
                with taking_part(self._joined):
                    if self._prepared.spread.sharded:
                        self._do(order, value)
            except CheckpointError as error:  # process 0 fails of it too, and announces how it goes on
                logger.error("%s", error)  # noqa: TRY400 - no traceback of what a disk refuses

    def _do(self, order: Order, step: int) -> None:
        if order is Order.CAPTURE:
            self._publish_part.send(step)
        elif order is Order.CAPTURE_ADAPTER:
            self._publish_part.capture_adapter()
        elif order is Order.SCORE:
            self._publish_part.score(self._publish_part.probes)
        elif order is Order.FINAL:
            write_final_model(self._config, self._prepared)
        elif order is Order.CHECKPOINT:
            names = trained_parameter_names(self._prepared.policy.model)
            state = self._prepared.state.model_copy(update={"step": step, "parameter_names": names})
            write_checkpoint_files(self._config, self._prepared, state, library_versions())
