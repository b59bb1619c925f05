"""The run: batch -> samples -> step -> publish -> checkpoint -> next batch.

What each of these is: `trainer.run.optimizer_step`, `trainer.run.batch_tracker`,
`trainer.run.publish_schedule`, `trainer.run.checkpointing`. Here is the order in which they have their turns,
on process 0; the others follow it (`trainer.run.follower`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from atropos_client.journal import Journal
from trainer.config import TrainerConfig
from trainer.errors import AnotherProcessFailed, ConfigurationError
from trainer.model.weighted_sft_call import Alignment, compute_advantage_weighted_sft_loss
from trainer.monitoring import Progress, RunPhase
from trainer.publish import Publisher
from trainer.run.batch_tracker import BatchTracker
from trainer.run.checkpointing import CheckpointWriter
from trainer.run.metrics import Row, RowWriter, batch_metrics, packing_metrics, step_metrics
from trainer.run.optimizer_step import StepAborted, StepResult, StepRunner
from trainer.run.orders import Outcome, Stopped, end, next_batch
from trainer.run.publish_schedule import PublishSchedule
from trainer.run.stop_request import StopRequest
from trainer.run.train_state import PreparedRun
from trainer.sources.incoming import BatchSource, EndOfBatches, IncomingBatch, PreparedStep

ASKED_ELSEWHERE = "another process was asked to stop"
_ENDING = "the fetching process, the publisher and trackers to end"

NO_MORE_BATCHES = "there are no more batches"
"""Why a run on recordings stops early."""
_OUTCOMES = {None: Outcome.DONE, NO_MORE_BATCHES: Outcome.OUT_OF_BATCHES}
"""By why the run stopped early; anything else was a request."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Steps, files and reason with which a run ended."""

    step: int
    """Optimizer steps done."""
    stopped_early: str | None
    """Why it ended before its last step; None if it did not."""
    final_model: Path | None
    """The finished model; None if the run stopped early."""
    checkpoint: Path
    """The newest checkpoint."""
    counters: dict[str, int]
    """Everything set aside, by reason."""


class Trainer:
    """Trains a policy on batches and publishes it; on process 0, which the others follow.

    Args:
        config: The run's configuration.
        prepared: See `trainer.run.train_state.prepare_run`.
        steps: Prepares batches and computes their steps.
        source: Where batches come from.
        ledger: Where the outcome of each batch is noted, for a source whose batches are numbered; closed when
            the run ends. None: nowhere.
        publisher: How weights reach the inference servers; None trains only.
        on_row: Called with every metrics row, e.g. to show progress.
        progress: Where the present phase and how far the run has come are noted, for whoever watches it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: PreparedRun,
        steps: StepRunner,
        *,
        source: BatchSource,
        ledger: Journal | None = None,
        publisher: Publisher | None = None,
        on_row: Callable[[Row], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._accelerator = prepared.accelerator
        self._source = source
        self._ledger = ledger
        self._progress = progress or Progress()
        self._stop = StopRequest(prepared.joined, grace=config.checkpoint.grace, progress=self._progress)
        self.starting = False
        """Whether the run still waits for servers and the API: its checkpoint stands, no step has begun."""
        self._steps = steps
        self._rows = RowWriter(config, prepared, on_row=on_row)
        self._tracker = BatchTracker(
            config, prepared, source=source, ledger=ledger, rows=self._rows, progress=self._progress
        )
        self._checkpoints = CheckpointWriter(
            config, prepared, self._tracker, ledger=ledger, progress=self._progress
        )
        self._publishes = PublishSchedule(
            publisher,
            config,
            rows=self._rows,
            stop_requested=lambda: self.stop_requested,
            progress=self._progress,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done; also the policy version: every step makes new weights."""
        return self._tracker.step

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to end before its next batch."""
        return self._stop.asked

    def request_stop(self, reason: str) -> None:
        """Ask the run to write a checkpoint and end; safe from any thread and from a signal handler.

        A step under way is given up if it takes longer than `checkpoint.grace` from now; everything else
        waits for the end of the step.
        """
        self._stop.ask(reason)

    def save_if_stopping(self) -> bool:
        """For long waits of the training thread between steps: whether to stop, what there is being saved.

        Raises:
            CheckpointError: It cannot be saved.
        """
        if not self.stop_requested:
            return False
        if self._steps.weights_whole and not self._checkpoints.has_current_step:
            self._checkpoints.write()
        return True

    def compute_advantage_weighted_sft_loss(
        self, input_ids: Tensor, advantages: Tensor, loss_mask: Tensor, *, alignment: Alignment = "prediction"
    ) -> Tensor:
        """The seed's loss on this trainer's model; see `trainer.compute_advantage_weighted_sft_loss`."""
        with self._accelerator.autocast():
            return compute_advantage_weighted_sft_loss(
                self._prepared.model, input_ids, advantages, loss_mask, alignment=alignment
            )

    def run(self) -> RunSummary:
        """Train until `train.steps`, or until asked to stop.

        Whatever ends the run, a checkpoint of the last whole step is written first.

        Raises:
            TrainerError: See `trainer.errors`.
            AtroposClientError: The API refuses us for good, or the journal cannot be written.
        """
        joined = self._prepared.joined
        try:
            summary = self._run()
            end(joined, _OUTCOMES.get(summary.stopped_early, Outcome.STOPPED))
            self._accelerator.end_training()
        except BaseException as error:
            if self._others_listen_after(error):  # else they notice that this process is gone
                with contextlib.suppress(AnotherProcessFailed):
                    end(joined, Outcome.FAILED)
            raise
        finally:
            if self._ledger is not None:
                self._ledger.close()
            joined.release()
        return summary

    def _run(self) -> RunSummary:
        stopped_early: str | None = None
        self._rows.start_trackers()
        try:
            if not self._checkpoints.has_current_step:
                self._checkpoints.write()
            self.starting = True
            self._publishes.start(self.step)
            stopped_early = self._train()
            self._progress.begin(RunPhase.STOPPING, _ENDING)
            if not self._checkpoints.has_current_step:  # before anything that waits for others
                self._checkpoints.write()
            self._publishes.finish(self.step)
        except BaseException as error:
            listen = self._others_listen_after(error)
            if self._prepared.spread.sharded and not listen:  # they need not wait for what ends below
                self._prepared.joined.say_end(error)
            self._checkpoints.save_last_whole_step(
                weights_whole=self._steps.weights_whole, others_listen=listen
            )
            raise
        finally:
            self._progress.begin(RunPhase.STOPPING, _ENDING)
            self._tracker.keep_unused(self._source.stop())
            self._publishes.close()
        final = self._checkpoints.write_final_model() if stopped_early is None else None
        return RunSummary(
            step=self.step,
            stopped_early=stopped_early,
            final_model=final,
            checkpoint=self._checkpoints.newest,
            counters=self._tracker.all_counters(),
        )

    def _others_listen_after(self, error: BaseException) -> bool:
        """Whether all other processes wait for an order: between two of them, if none is gone."""
        parted = self._steps.under_way or self._prepared.joined.parted
        return not (parted or isinstance(error, AnotherProcessFailed))

    def _train(self) -> str | None:
        """Run steps until the last; returns why it ended early, if it did."""
        self._progress.begin(RunPhase.STARTING, self._source.party)
        self._source.start()
        self.starting = False
        self._progress.begin(RunPhase.TRAINING, "the computation")
        describe = self._source.describe_wait
        while self.step < self._config.train.steps:
            started = time.monotonic()
            try:
                with self._progress.phase(RunPhase.WAITING, self._source.party, describe):
                    incoming = next_batch(
                        self._prepared.joined,
                        self._source,
                        timeout=self._config.atropos.batch_timeout,
                        stop_requested=lambda: self.stop_requested,
                        meanwhile=self._tend,
                    )
            except Stopped:
                return self._stop.reason or ASKED_ELSEWHERE
            except EndOfBatches:
                return NO_MORE_BATCHES
            self._progress.note_batch()
            self._tracker.receive(incoming)
            waited = time.monotonic() - started
            try:
                with self._progress.phase(
                    RunPhase.TRAINING, f"the computation of batch {self._tracker.batch}"
                ):
                    self._train_on(incoming, waited=waited)
            except StepAborted:
                grace = f"{self._config.checkpoint.grace:g} s"
                reason = f"the run was to end and its step took longer than {grace} more"
                self._tracker.forget(incoming, reason=reason)
                return self._stop.reason or ASKED_ELSEWHERE
            del incoming  # its tensors: the next batch has tensors of its own
        return None

    def _tend(self) -> None:
        """Between steps and while waiting for a batch."""
        self._tracker.note_counts()
        self._publishes.tend(self.step)

    def _train_on(self, incoming: IncomingBatch, *, waited: float) -> None:
        """Train on one batch, or pass over it with a reason."""
        started = time.monotonic()
        prepared = self._tracker.sift(incoming, self._prepared_step)
        if prepared is None:
            return
        batch = prepared.batch
        result = self._steps.train_on(
            prepared.micro_batches,
            step=self.step,
            served_version=incoming.served_version,
            accepts=self._tracker.accepts,
            should_abort=self._stop.grace_is_over,
        )
        if result.refused:
            self._tracker.refuse(incoming, result.mismatch, result.staleness)
        if not result.applied:
            reason = f"loss {result.loss} or gradient norm {result.grad_norm} is not finite"
            self._tracker.skip(incoming, batch, reason, counter="batches_not_finite")
            return
        self._tracker.note_masked(result.per_token.get("masked"))
        self._tracker.note_trained(batch)
        self._steps.logprob_log.write(
            step=self.step,
            batch=self._tracker.batch,
            set_aside={group.group_index for group in batch.set_aside},
        )
        self._conclude(incoming, prepared, result, waited=waited, trained=time.monotonic() - started)

    def _conclude(
        self,
        incoming: IncomingBatch,
        prepared: PreparedStep,
        result: StepResult,
        *,
        waited: float,
        trained: float,
    ) -> None:
        """After a step: publish, write its row, and save what is due.

        `waited` and `trained` are seconds: for the batch, and from then to its new weights.
        """
        row: Row = {
            "kind": "step",
            "step": self.step,
            "policy_version": self.step,
            "batch": self._tracker.batch,
            "served_version": incoming.served_version,
            **batch_metrics(prepared.batch),
            "set_aside_share": self._tracker.set_aside_share,
            **packing_metrics(prepared.micro_batches, self._prepared.spread),
            **step_metrics(result),
            "waiting_seconds": waited,
            "preparing_seconds": prepared.seconds,
            "prepared_ahead": incoming.prepared is not None,
            "training_seconds": trained,
            "tokens_per_second": prepared.batch.trained_tokens / trained,
            "total_tokens_per_second": sum(each.sequence_tokens for each in prepared.micro_batches) / trained,
            **self._tracker.all_counters(),
        }
        started = time.monotonic()
        try:
            self._publishes.publish(self.step)
        finally:  # the step counts, also where the failure of a publish before it ends the run here
            row["publishing_seconds"] = time.monotonic() - started  # the rest goes on beside the next step
            self._rows.write(row, step=self.step)
            self._rows.write_rollouts(prepared.batch, step=self.step)
        self._publishes.write_rows(self.step)
        # After the row: a resumed run drops the rows that its checkpoint does not count, and misses none.
        if self.step % self._config.checkpoint.every == 0:
            self._checkpoints.write()
        self._steps.begin_idling()  # publish and checkpoint are no idleness

    def _prepared_step(self, incoming: IncomingBatch) -> PreparedStep:
        """Take what was prepared ahead, or prepare it now; a batch that cannot be prepared is kept."""
        failure = incoming.failure
        if failure is None:
            try:
                with self._progress.phase(
                    RunPhase.PREPARING, f"the preparation of batch {self._tracker.batch}"
                ):
                    return incoming.prepared or self._steps.prepare(incoming.reply)
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept first
                failure = error
        # With a configuration that works a batch of the journal, which waits there, is as good as any.
        if not incoming.number or not isinstance(failure, ConfigurationError):
            self._tracker.set_aside(incoming, str(failure))
        raise failure
