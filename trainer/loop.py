"""The run: batch -> samples -> step -> publish -> checkpoint -> next batch.

What each of these is: `trainer.computation`, `trainer.outcomes` (what becomes of a batch),
`trainer.published_steps`, `trainer.checkpoint_writer`. Here is the order in which they have their turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from schemas import BatchReply
from trainer.checkpoint_writer import CheckpointWriter
from trainer.computation import Computation, ComputedStep
from trainer.config import TrainerConfig
from trainer.exchange import BatchExchange, Stopped
from trainer.metrics import Row, StepTimes, batch_metrics, step_metrics, time_metrics
from trainer.outcomes import Outcomes
from trainer.preparation import PreparedStep
from trainer.published_steps import PublishedSteps, WeightPublisher
from trainer.row_writer import RowWriter
from trainer.setup import Prepared
from trainer.sources import BatchLedger, BatchSource, EndOfBatches, IncomingBatch
from trainer.step import StepGivenUp
from trainer.watch import Parties, Phase, Progress
from trainer.weighted_sft import Alignment, compute_advantage_weighted_sft_loss

__all__ = ["RunSummary", "Trainer", "WeightPublisher"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended."""

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
    """Trains a policy on batches and publishes it.

    Args:
        config: The run's configuration.
        prepared: See `trainer.setup.prepare_run`.
        source: Where batches come from; asked on process 0 only.
        ledger: Where the outcome of each batch is noted, for a source whose batches are numbered; closed when
            the run ends. None: nowhere.
        publisher: How weights reach the inference servers; None trains only.
        on_row: Called with every metrics row on process 0, e.g. to show progress.
        progress: Where the present phase and how far the run has come are noted, for whoever watches it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: Prepared,
        *,
        source: BatchSource,
        ledger: BatchLedger | None = None,
        publisher: WeightPublisher | None = None,
        on_row: Callable[[Row], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._accelerator = prepared.accelerator
        self._source = source
        self._ledger = ledger
        self._progress = progress or Progress()
        self._stop_reason: str | None = None
        self._stop_asked_at = 0.0
        self.starting = False
        """Whether the run still waits for servers and the API: its checkpoint stands, no step has begun."""
        is_main_process = self._accelerator.is_main_process
        self._parties = Parties(config, source=source.party, is_main_process=is_main_process)
        self._computation = Computation(config, prepared)
        self._rows = RowWriter(config, prepared, on_row=on_row)
        self._outcomes = Outcomes(
            config, prepared, source=source, ledger=ledger, rows=self._rows, progress=self._progress
        )
        self._checkpoints = CheckpointWriter(
            config, prepared, self._outcomes, ledger=ledger, progress=self._progress, disk=self._parties.disk
        )
        self._published = PublishedSteps(
            publisher if is_main_process else None,
            every=config.publish.every,
            rows=self._rows,
            stop_requested=lambda: self.stop_requested,
            progress=self._progress,
            servers=self._parties.servers,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done; also the policy version: every step makes new weights."""
        return self._outcomes.step

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to end before its next batch."""
        return self._stop_reason is not None

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return int(self._accelerator.num_processes)

    def request_stop(self, reason: str) -> None:
        """Ask the run to write a checkpoint and end; safe from any thread and from a signal handler.

        A step under way is given up if it takes longer than `checkpoint.grace` from now (not with several
        processes); everything else waits for the end of the step.
        """
        self._stop_asked_at = time.monotonic()
        self._stop_reason = reason
        self._progress.stopping = True

    def prepare(self, reply: BatchReply) -> PreparedStep:
        """Prepare a step; batches must be prepared in the order in which they are trained.

        A source may call it ahead, in a thread of its own: it changes nothing but the advantage normalizer,
        whose state checkpoints take from the batches that were trained.

        Raises:
            MissingLogProbsError: No group of the batch carries the log-probs that the loss needs.
        """
        return self._computation.prepare(reply)

    def save_if_stopping(self) -> bool:
        """For long waits of the training thread between steps: whether to stop, what there is being saved.

        Raises:
            CheckpointError: It cannot be saved.
        """
        if not self.stop_requested:
            return False
        if self.processes == 1 and self._computation.weights_whole and not self._checkpoints.has_current_step:
            self.write_checkpoint()
        return True

    def write_checkpoint(self) -> None:
        """Write a checkpoint of the current step, on process 0, and delete the oldest.

        Raises:
            CheckpointError: It cannot be written.
        """
        self._checkpoints.write()

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
        try:
            return self._run()
        finally:
            if self._ledger is not None:
                self._ledger.close()

    def _run(self) -> RunSummary:
        stopped_early: str | None = None
        self._rows.start_trackers()
        try:
            if not self._checkpoints.has_current_step:
                self.write_checkpoint()
            self.starting = True
            self._published.start(self.step)
            stopped_early = self._train()
            self._progress.begin(Phase.STOPPING, self._parties.ending)
            if not self._checkpoints.has_current_step:  # before anything that waits for others
                self.write_checkpoint()
            self._published.finish(self.step)
        except BaseException:
            self._checkpoints.save_what_there_is(weights_whole=self._computation.weights_whole)
            raise
        finally:
            self._progress.begin(Phase.STOPPING, self._parties.ending)
            self._outcomes.keep_unused(self._source.stop())
            self._published.close()
        final = self._checkpoints.write_final_model() if stopped_early is None else None
        # Nobody leaves the process group while another still writes. And while all wait here, gloo's threads
        # let go of the last tensors that they moved: one that does so while Python shuts down aborts it.
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()
        return RunSummary(
            step=self.step,
            stopped_early=stopped_early,
            final_model=final,
            checkpoint=self._checkpoints.newest,
            counters=self._outcomes.all_counters(),
        )

    def _train(self) -> str | None:
        """Run steps until the last; returns why it ended early, if it did."""
        exchange = BatchExchange(
            self._accelerator,
            self._source,
            timeout=self._config.atropos.batch_timeout,
            stop_requested=lambda: self.stop_requested,
            meanwhile=self._tend,
        )
        if self._accelerator.is_main_process:
            self._progress.begin(Phase.STARTING, self._parties.batches)
            self._source.start()
        self.starting = False
        self._progress.begin(Phase.TRAINING, self._parties.computation)
        describe = self._source.describe_wait if self._accelerator.is_main_process else None
        while self.step < self._config.train.steps:
            started = time.monotonic()
            try:
                with self._progress.phase(Phase.WAITING, self._parties.batches, describe):
                    incoming = exchange.next()
            except Stopped:
                self._stop_reason = self._stop_reason or "another process was asked to stop"
                return self._stop_reason
            except EndOfBatches:
                return "there are no more batches"
            self._progress.note_batch()
            self._outcomes.receive(incoming)
            waited = time.monotonic() - started
            try:
                with self._progress.phase(
                    Phase.TRAINING, f"{self._parties.computation} of batch {self._outcomes.batch}"
                ):
                    self._train_on(incoming, waited=waited)
            except StepGivenUp:
                grace = f"{self._config.checkpoint.grace:g} s"
                reason = f"the run was to end and its step took longer than {grace} more"
                self._outcomes.forget(incoming, reason=reason)
                return self._stop_reason
            del incoming  # its tensors: the next batch has tensors of its own
        return None

    def _tend(self) -> None:
        """Between steps and while waiting for a batch."""
        self._outcomes.note_facts()
        self._published.tend(self.step)

    def _grace_is_over(self) -> bool:
        """Whether the step under way is to be given up; processes would not agree on the moment."""
        return (
            self.stop_requested
            and self.processes == 1
            and time.monotonic() - self._stop_asked_at >= self._config.checkpoint.grace
        )

    def _train_on(self, incoming: IncomingBatch, *, waited: float) -> None:
        """Train on one batch, or pass over it with a reason."""
        started = time.monotonic()
        if incoming.unreadable is not None:
            self._outcomes.pass_over_unreadable(incoming, incoming.unreadable)
            return
        prepared = self._prepared_step(incoming)
        batch = prepared.batch
        self._outcomes.count(incoming, batch)
        if batch.why_empty is not None:
            self._outcomes.skip(incoming, batch, batch.why_empty, counter="batches_without_signal")
            return
        computed = self._computation.compute(
            prepared,
            step=self.step,
            served_version=incoming.served_version,
            accepts=self._outcomes.accepts,
            give_up=self._grace_is_over,
        )
        result = computed.result
        if result.refused:
            self._outcomes.refuse(incoming, result.mismatch, computed.staleness)
        if not result.applied:
            reason = f"loss {result.loss} or gradient norm {result.grad_norm} is not finite"
            self._outcomes.skip(incoming, batch, reason, counter="batches_not_finite")
            return
        self._outcomes.note_trained(batch)
        self._conclude(
            incoming, prepared, computed, waited=waited, training_seconds=time.monotonic() - started
        )

    def _conclude(
        self,
        incoming: IncomingBatch,
        prepared: PreparedStep,
        computed: ComputedStep,
        *,
        waited: float,
        training_seconds: float,
    ) -> None:
        """After a step: publish, write its row, and save what is due."""
        started = time.monotonic()
        self._published.publish(self.step)
        times = StepTimes(
            waiting=waited,
            idle=computed.idle,
            preparing=prepared.seconds,
            prepared_ahead=incoming.prepared is not None,
            training=training_seconds,
            publishing=time.monotonic() - started,
        )
        row: Row = {
            "kind": "step",
            "step": self.step,
            "policy_version": self.step,
            "batch": self._outcomes.batch,
            "served_version": incoming.served_version,
            "staleness": computed.staleness,
            "learning_rate": computed.learning_rate,
            **batch_metrics(prepared.batch),
            "set_aside_share": self._outcomes.set_aside_share,
            **step_metrics(computed.result),
            **time_metrics(times, prepared.batch, computed.result),
            **self._outcomes.all_counters(),
        }
        self._rows.write(row, step=self.step)
        self._published.write_rows(self.step)
        # After the row: a resumed run drops the rows that its checkpoint does not count, and misses none.
        if self.step % self._config.checkpoint.every == 0:
            self.write_checkpoint()
        self._computation.begin_idling()  # publish and checkpoint are no idleness

    def _prepared_step(self, incoming: IncomingBatch) -> PreparedStep:
        """Take what was prepared ahead, or prepare it now; a batch that cannot be prepared is kept."""
        failure = incoming.failure
        if failure is None:
            try:
                with self._progress.phase(
                    Phase.PREPARING, f"the preparation of batch {self._outcomes.batch}"
                ):
                    return incoming.prepared or self.prepare(incoming.reply)
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept first
                failure = error
        self._outcomes.set_aside(incoming, str(failure))
        raise failure
