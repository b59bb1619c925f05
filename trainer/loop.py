"""The run: batch -> samples -> step -> publish -> checkpoint -> next batch."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from atropos_client.journal import Outcome
from schemas import BatchReply
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
from trainer.errors import CheckpointError, MismatchTooLarge, TooManySetAside, TooManySkippedBatches
from trainer.exchange import BatchExchange, Stopped
from trainer.metrics import MetricsFile, Row, batch_metrics, step_metrics
from trainer.mismatch import Mismatch, alarm_text
from trainer.model_directory import write_model_directory
from trainer.preparation import PreparedBatch, PreparedStep, prepare_batch
from trainer.publish import PublishReport
from trainer.schedule import learning_rate
from trainer.set_aside import SetAsideStore
from trainer.set_aside_share import SetAsideShare
from trainer.setup import Prepared, checkpoint_directory, library_versions, make_step_runner
from trainer.sources import BatchLedger, BatchSource, EndOfBatches, IncomingBatch
from trainer.step import StepGivenUp
from trainer.undo import BeforeBatch
from trainer.watch import Facts, Parties, Phase, Progress
from trainer.weighted_sft import Alignment, compute_advantage_weighted_sft_loss

logger = logging.getLogger(__name__)


class WeightPublisher(Protocol):
    """What the loop asks of a publisher; see `trainer.publish.Publisher`."""

    def start(self, version: int) -> Any:
        """Make sure that `version` is served before anything is trained."""

    def begin(self, version: int) -> None:
        """Publish the current weights; return as soon as training may change them."""

    def settle(self) -> None:
        """Wait until no publish is under way."""

    def tend(self, version: int) -> None:
        """See to what needs the training thread; called often, `version` being the current one."""

    def take_reports(self) -> Sequence[PublishReport]:
        """What the publishes that have ended have done."""

    def close(self) -> None:
        """End everything that goes on in the background."""


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
        self._progress = progress or Progress()
        self._prepared = prepared
        self._accelerator = prepared.accelerator
        self._source = source
        self._ledger = ledger
        self._publisher = publisher if prepared.accelerator.is_main_process else None
        self._on_row = on_row
        state = prepared.checkpoint.state if prepared.checkpoint is not None else None
        self.step = state.step if state else 0
        """Optimizer steps done; also the policy version: every step makes new weights."""
        self._batches = state.batches if state else 0
        self._settled_batches = self._batches  # those whose outcome is known: what a checkpoint counts
        self._counters = Counter(state.counters if state else {})
        self._checkpointed_step = state.step if state else -1
        self._checkpointed_batches = self._batches
        self._published_step = -1
        self._skips_in_a_row = 0
        self._stop_reason: str | None = None
        self._stop_asked_at = 0.0
        self.starting = False
        """Whether the run still waits for servers and the API: its checkpoint stands, no step has begun."""
        self._weights_whole = True
        self._normalizer_state = prepared.normalizer.state_dict()
        self._idle_since: float | None = None
        self._parties = Parties(
            config, source=source.party, is_main_process=prepared.accelerator.is_main_process
        )
        self._set_aside = SetAsideStore(
            config.train.output_dir / "set_aside", max_bytes=config.train.set_aside_max_bytes
        )
        self._set_aside_share = SetAsideShare(config.train, state.set_aside_window if state else None)
        self._settled_share = self._set_aside_share.state
        self._run_step = make_step_runner(config, prepared)
        # Of what is loaded: the environment on the disk may change, or go, while a run lasts.
        self._versions = library_versions()
        if self._accelerator.is_main_process:
            self._metrics = MetricsFile(
                config.train.output_dir / "metrics.jsonl",
                resumed_step=self.step,
                resumed_batch=self._batches,
            )
            self._set_aside.forget_after(self._batches)
        self._note_facts()

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
        started = time.monotonic()
        batch = prepare_batch(
            reply,
            limits=self._prepared.policy.limits,
            data=self._config.data,
            loss=self._config.loss,
            normalizer=self._prepared.normalizer,
        )
        micro_batches = self._run_step.pack(batch) if batch.samples else []
        return PreparedStep(batch=batch, micro_batches=micro_batches, seconds=time.monotonic() - started)

    def save_if_stopping(self) -> bool:
        """For long waits of the training thread between steps: whether to stop, what there is being saved.

        Raises:
            CheckpointError: It cannot be saved.
        """
        if not self.stop_requested:
            return False
        if self.processes == 1 and self._weights_whole and self._checkpointed_step != self.step:
            self.write_checkpoint()
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
        try:
            return self._run()
        finally:
            if self._ledger is not None:
                self._ledger.close()

    def _run(self) -> RunSummary:
        stopped_early: str | None = None
        self._start_trackers()
        try:
            if self._checkpointed_step != self.step:
                self.write_checkpoint()
            self.starting = True
            if self._publisher is not None:
                with self._progress.phase(Phase.PUBLISHING, self._parties.servers):
                    self._publisher.start(self.step)
                self._published_step = self.step
            stopped_early = self._train()
            self._progress.begin(Phase.STOPPING, self._parties.ending)
            if self._checkpointed_step != self.step:  # before anything that waits for others
                self.write_checkpoint()
            self._finish_publishing()
        except BaseException:
            self._save_what_there_is()
            raise
        finally:
            self._progress.begin(Phase.STOPPING, self._parties.ending)
            self._keep_unused_batches()
            if self._publisher is not None:
                self._publisher.close()
        final = self._write_final_model() if stopped_early is None else None
        # Nobody leaves the process group while another still writes. And while all wait here, gloo's threads
        # let go of the last tensors that they moved: one that does so while Python shuts down aborts it.
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()
        return RunSummary(
            step=self.step,
            stopped_early=stopped_early,
            final_model=final,
            checkpoint=checkpoint_path(checkpoint_directory(self._config), self._checkpointed_step),
            counters=self._all_counters(),
        )

    def _start_trackers(self) -> None:
        """Open the configured experiment trackers, on process 0, with the settings of the run."""
        settings = self._config.logging
        if settings.trackers:
            # Trackers take plain values only; secrets are masked by the dump.
            dump = self._config.model_dump(mode="json")
            flat = {f"{name}.{key}": str(value) for name, part in dump.items() for key, value in part.items()}
            run_options = {"wandb": {"group": settings.group}} if settings.group else {}
            self._accelerator.init_trackers(settings.project, config=flat, init_kwargs=run_options)

    def _train(self) -> str | None:
        """Run steps until the last; returns why it ended early, if it did."""
        exchange = BatchExchange(
            self._accelerator,
            self._source,
            timeout=self._config.atropos.batch_timeout,
            stop_requested=lambda: self.stop_requested,
            meanwhile=self._tend_publisher,
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
            before = BeforeBatch.of(self._batches, self._counters)
            self._batches = incoming.number or self._batches + 1  # a journal numbers its batches itself
            waited = time.monotonic() - started
            try:
                with self._progress.phase(
                    Phase.TRAINING, f"{self._parties.computation} of batch {self._batches}"
                ):
                    self._train_on(incoming, waited=waited)
            except StepGivenUp:
                self._forget_step(before, incoming)
                return self._stop_reason
            del incoming  # its tensors: the next batch has tensors of its own
        return None

    def _grace_is_over(self) -> bool:
        """Whether the step under way is to be given up; processes would not agree on the moment."""
        return (
            self.stop_requested
            and self.processes == 1
            and time.monotonic() - self._stop_asked_at >= self._config.checkpoint.grace
        )

    def _forget_step(self, before: BeforeBatch, incoming: IncomingBatch) -> None:
        """Be as before the batch, which is kept: in the journal, or set aside where there is none."""
        self._weights_whole = True
        self._batches = before.batches
        self._counters = Counter(before.counters)
        before.restore()
        self._set_aside_share = SetAsideShare(self._config.train, self._settled_share)
        if self._ledger is not None:
            return
        reason = f"the run was to end and its step took longer than {self._config.checkpoint.grace:g} s more"
        self._counters["batches_unused"] += 1
        self._set_aside.keep_batch(incoming.body, batch=self._batches + 1, reason=reason)

    def _train_on(self, incoming: IncomingBatch, *, waited: float) -> None:
        """Train on one batch, or set it aside with a reason."""
        started = time.monotonic()
        if incoming.unreadable is not None:
            self._set_aside_unreadable(incoming, incoming.unreadable)
            return
        prepared = self._prepared_step(incoming)
        batch = prepared.batch
        self._count(batch)
        self._watch_set_aside(incoming, batch)
        if batch.why_empty is not None:
            self._skip(
                incoming, batch.why_empty, counter="batches_without_signal", normalizer=batch.normalizer
            )
            return
        rate = learning_rate(self._config.optimizer, self.step, self._config.train.steps)
        for group in self._prepared.optimizer.param_groups:
            group["lr"] = rate
        staleness = self.step - incoming.served_version if incoming.served_version >= 0 else None
        self._weights_whole = False
        idle = time.monotonic() - self._idle_since if self._idle_since is not None else None
        result = self._run_step(
            prepared.micro_batches,
            accepts=lambda mismatch: self._accept(mismatch, staleness),
            give_up=self._grace_is_over,
        )
        self._idle_since = time.monotonic()
        self._weights_whole = True
        if result.refused:
            self._refuse(incoming, result.mismatch, staleness)
        if not result.applied:
            reason = f"loss {result.loss} or gradient norm {result.grad_norm} is not finite"
            self._skip(incoming, reason, counter="batches_not_finite", normalizer=batch.normalizer)
            return
        self._skips_in_a_row = 0
        self._normalizer_state = batch.normalizer
        self.step += 1
        self._settle("trained")
        training_seconds = time.monotonic() - started
        publishing = time.monotonic()
        self._publish()
        publishing_seconds = time.monotonic() - publishing
        self._write_row(
            {
                "kind": "step",
                "step": self.step,
                "policy_version": self.step,
                "batch": self._batches,
                "served_version": incoming.served_version,
                "staleness": staleness,
                "learning_rate": rate,
                **batch_metrics(batch),
                "set_aside_share": self._set_aside_share.share,
                **step_metrics(result),
                "waiting_seconds": waited,
                "idle_seconds": idle,
                "preparing_seconds": prepared.seconds,
                "prepared_ahead": incoming.prepared is not None,
                "training_seconds": training_seconds,
                "publishing_seconds": publishing_seconds,
                "tokens_per_second": batch.trained_tokens / training_seconds,
                "total_tokens_per_second": result.sequence_tokens / training_seconds,
                **self._all_counters(),
            }
        )
        self._write_publish_rows()
        # After the row: a resumed run drops the rows that its checkpoint does not count, and misses none.
        if self.step % self._config.checkpoint.every == 0:
            self.write_checkpoint()
        self._idle_since = time.monotonic()  # publish and checkpoint are no idleness

    def _prepared_step(self, incoming: IncomingBatch) -> PreparedStep:
        """Take what was prepared ahead, or prepare it now; a batch that cannot be prepared is kept."""
        failure = incoming.failure
        if failure is None:
            try:
                with self._progress.phase(Phase.PREPARING, f"the preparation of batch {self._batches}"):
                    return incoming.prepared or self.prepare(incoming.reply)
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept first
                failure = error
        self._set_aside_whole(incoming, str(failure))
        raise failure

    def _settle(self, outcome: Outcome, *, reason: str | None = None) -> None:
        """What becomes of the batch is decided: from now on a checkpoint counts it."""
        self._settled_batches = self._batches
        self._settled_share = self._set_aside_share.state
        if self._ledger is not None:
            step = self.step if outcome == "trained" else None
            self._ledger.settle(self._batches, outcome, step=step, reason=reason)
        self._note_facts()

    def _note_facts(self) -> None:
        self._progress.facts = Facts(
            step=self.step,
            batches=self._settled_batches,
            possibly_lost=self._source.counters().get("intake_possibly_lost", 0),
        )

    def _accept(self, mismatch: Mismatch | None, staleness: int | None) -> bool:
        """Whether to train on a batch whose log-probs differ like this; raises the alarm if there is one."""
        alarm = alarm_text(mismatch, staleness, self._config.train)
        if alarm is None:
            return True
        self._counters["mismatch_alarms_total"] += 1
        logger.warning("Batch %d: %s", self._batches, alarm)
        return self._config.train.mismatch_action == "warn"

    def _refuse(self, incoming: IncomingBatch, mismatch: Mismatch | None, staleness: int | None) -> None:
        """Keep the batch and end the run.

        Raises:
            MismatchTooLarge: Always.
        """
        reason = alarm_text(mismatch, staleness, self._config.train) or "its mismatch was not accepted"
        self._set_aside_whole(incoming, reason)
        raise MismatchTooLarge(
            f"batch {self._batches}: {reason}. The batch is kept in "
            f"{self._config.train.output_dir / 'set_aside'} and was not trained on; to go on all the same, "
            "set train.mismatch_action to warn"
        )

    def _publish(self) -> None:
        """Publish if it is time; how it went is written when it is known."""
        if self._publisher is None or self.step % self._config.publish.every or self.stop_requested:
            return
        with self._progress.phase(Phase.PUBLISHING, self._parties.servers):
            self._publisher.begin(self.step)
        self._published_step = self.step

    def _tend_publisher(self) -> None:
        """Between steps and while waiting for a batch."""
        self._note_facts()
        if self._publisher is not None:
            self._publisher.tend(self.step)
            self._write_publish_rows()

    def _finish_publishing(self) -> None:
        """The last version is served, and proven, before the run ends; not if it was asked to stop.

        Then only a publish under way is waited for: whoever asked may not have the time for another, and
        the next start publishes what the checkpoint has.
        """
        if self._publisher is None:
            return
        with self._progress.phase(Phase.PUBLISHING, self._parties.servers):
            if self._published_step != self.step and not self.stop_requested:
                self._publisher.begin(self.step)
            self._publisher.settle()
        self._write_publish_rows()

    def _write_publish_rows(self) -> None:
        for report in self._publisher.take_reports() if self._publisher is not None else ():
            row: Row = {name.replace("/", "_"): value for name, value in report.metrics().items()}
            row["publish_seconds"] = row.pop("publish_total_seconds")
            row["publish_verified"] = report.verified
            row["publish_already_served"] = report.already_served
            self._write_row({"kind": "publish", "step": report.version, "version": report.version, **row})

    def _save_what_there_is(self) -> None:
        """After a failure: a checkpoint of the last whole step, if this process can write one alone."""
        counted = (self.step, self._settled_batches)
        if counted == (self._checkpointed_step, self._checkpointed_batches):
            return
        if not self._weights_whole or self._accelerator.num_processes > 1:
            logger.warning("No checkpoint of step %d: it cannot be written now", self.step)
            return
        try:
            self.write_checkpoint()
        except CheckpointError:  # the failure under way matters more than this one
            logger.exception("No checkpoint of step %d", self.step)

    def _keep_unused_batches(self) -> None:
        """Stop the source; what it fetched early and nobody trained on is kept, not lost."""
        for number, body in enumerate(self._source.stop(), start=self._batches + 1):
            self._counters["batches_unused"] += 1
            self._set_aside.keep_batch(body, batch=number, reason="the run ended before it was trained on")

    def _count(self, batch: PreparedBatch) -> None:
        self._counters["set_aside_groups_total"] += len(batch.set_aside)
        self._counters["groups_without_spread_total"] += batch.groups_without_spread
        self._counters["groups_with_binary_masks_total"] += batch.groups_with_binary_masks
        if self._accelerator.is_main_process:
            self._set_aside.keep_groups(batch.set_aside, batch=self._batches)

    def _watch_set_aside(self, incoming: IncomingBatch, batch: PreparedBatch) -> None:
        reasons = [group.reason for group in batch.set_aside]
        try:
            alarm = self._set_aside_share.add(groups=batch.groups + len(reasons), reasons=reasons)
        except TooManySetAside as error:
            self._set_aside_whole(incoming, str(error))
            raise
        self._counters["set_aside_alarms_total"] += alarm

    def _skip(
        self, incoming: IncomingBatch, reason: str, *, counter: str, normalizer: dict[str, float]
    ) -> None:
        """Set a whole batch aside; too many in a row end the run."""
        self._normalizer_state = normalizer
        self._counters[counter] += 1
        self._skips_in_a_row += 1
        self._pass_over(incoming, "skipped", reason)
        if self._skips_in_a_row >= self._config.train.max_consecutive_skips:
            raise TooManySkippedBatches(
                f"{self._skips_in_a_row} batches in a row could not be trained "
                f"(train.max_consecutive_skips), the last because {reason}; they are kept in "
                f"{self._config.train.output_dir / 'set_aside'}"
            )

    def _set_aside_unreadable(self, incoming: IncomingBatch, why: str) -> None:
        """Keep a body that is no batch at all. Not a skip: the poller's patience bounds a row of them."""
        self._counters["batches_unreadable"] += 1
        self._pass_over(incoming, "set_aside", f"unreadable: {why}")

    def _pass_over(self, incoming: IncomingBatch, outcome: Outcome, reason: str) -> None:
        """Keep a batch that is not trained on, with a row that says so; the run goes on."""
        self._keep(incoming, reason)
        row: Row = {"kind": "skipped", "step": self.step, "batch": self._batches, "reason": reason}
        self._write_row({**row, **self._all_counters()})
        self._settle(outcome, reason=reason)

    def _set_aside_whole(self, incoming: IncomingBatch, reason: str) -> None:
        """Keep a batch that ends the run."""
        self._keep(incoming, reason)
        self._settle("set_aside", reason=reason)

    def _keep(self, incoming: IncomingBatch, reason: str) -> None:
        if self._accelerator.is_main_process:
            self._set_aside.keep_batch(incoming.body, batch=self._batches, reason=reason)

    def _write_row(self, row: Row) -> None:
        if not self._accelerator.is_main_process:
            return
        self._metrics.write(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=self.step)
        if self._on_row is not None:
            self._on_row(row)

    def _all_counters(self) -> dict[str, int]:
        pruned = {"set_aside_pruned_total": self._set_aside.pruned}
        return {**self._counters, **pruned, **self._source.counters()}

    def write_checkpoint(self) -> None:
        """Write a checkpoint of the current step, on process 0, and delete the oldest."""
        with self._progress.phase(Phase.CHECKPOINTING, self._parties.disk):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        random_states = collect_random_states(self._accelerator.gather)
        if self._accelerator.is_main_process:
            directory = checkpoint_directory(self._config)
            write_checkpoint(
                checkpoint_path(directory, self.step),
                model=self._prepared.policy.model,
                tokenizer=self._prepared.policy.tokenizer,
                optimizer=self._prepared.optimizer,
                random_states=random_states,
                state=self._state(),
                configuration=self._config.model_dump(mode="json"),
                versions=self._versions,
            )
            settings = self._config.checkpoint
            prune_checkpoints(directory, keep=settings.keep, keep_every=settings.keep_every)
            self._prune_ledger(directory)
        self._checkpointed_step = self.step
        self._checkpointed_batches = self._settled_batches
        self._accelerator.wait_for_everyone()

    def _prune_ledger(self, directory: Path) -> None:
        """Let go of the bodies that no checkpoint needs any more."""
        if self._ledger is None or not self._config.journal.prune:
            return
        try:
            oldest = read_checkpoint(list_checkpoints(directory)[0])
        except CheckpointError as error:  # half deleted when an earlier process died; gone after the next one
            logger.warning("No body is deleted from the journal: %s", error)
            return
        self._ledger.prune(oldest.state.batches)

    def _state(self) -> RunState:
        return RunState(
            step=self.step,
            policy_version=self.step,
            batches=self._settled_batches,
            counters=dict(self._counters),
            normalizer=self._normalizer_state,
            stored_dtype=str(self._prepared.policy.stored_dtype).removeprefix("torch."),
            parameter_names=trained_parameter_names(self._prepared.policy.model),
            python_random=python_random_state(),
            numpy_random=numpy_random_state(),
            set_aside_window=self._settled_share,
        )

    def _write_final_model(self) -> Path:
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
