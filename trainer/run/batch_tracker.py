"""Tracks every batch: trained, skipped, or quarantined.

What is not trained on is kept first; then a row says so; then its outcome is settled. A checkpoint counts
settled batches only, so a run that dies in between gets the batch again.

Data flow: received batch -> verdict of the loop -> `set_aside/`, metrics, ledger -> what a checkpoint counts.
Whether a batch can be trained on is found elsewhere: `trainer.samples.prepare`, `trainer.run.optimizer_step`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

from atropos_client.journal import Journal, Outcome
from schemas import count_of
from trainer.checkpoints.format import CheckpointState
from trainer.config import TrainerConfig
from trainer.errors import MismatchTooLarge, TooManySetAside, TooManySkippedBatches
from trainer.monitoring import Progress, RunCounts
from trainer.run.logprob_mismatch import Mismatch, alarm_text, temperature_text, unjudged_text
from trainer.run.metrics import Row
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch
from trainer.samples.quarantine import QuarantineStore
from trainer.samples.quarantine_rate import QuarantineRate, QuarantineWindow
from trainer.sources.incoming import BatchSource, IncomingBatch, PreparedStep

logger = logging.getLogger(__name__)

_IGNORED_FIELDS = {
    "images": "is not supported",
    "distill_token_ids": "is not used, because distillation.mode is none",
}  # of groups, and why nothing is computed with them

_MOST_TOKENS = 0.5
"""Share of the trained tokens that a teacher's candidates may lack without a warning."""


@dataclass(frozen=True, kw_only=True)
class SettledCounts:
    """Fields of `CheckpointState` about the batches of a run, under the same names."""

    batches: int
    position: str
    counters: dict[str, int]
    set_aside_window: QuarantineWindow


class ResumePoint(Protocol):
    """What a run goes on from."""

    @property
    def state(self) -> CheckpointState:
        """Its counts."""

    @property
    def normalizer(self) -> AdvantageNormalizer:
        """As its checkpoint has it."""


class Rows(Protocol):
    """Where rows of the metrics go."""

    def write(self, row: Row, *, step: int) -> None:
        """Write a row at a step."""


class BatchTracker:
    """Tracks every batch of a run, and sees to it that none is lost.

    Args:
        config: The run's configuration.
        prepared: Its checkpoint says where the counting goes on.
        source: Where the batches come from; asked for its counters.
        ledger: Where the outcome of each batch is noted. None: nowhere.
        rows: Where the row of a batch that was passed over goes.
        progress: Where it is noted how far the run has come.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: ResumePoint,
        *,
        source: BatchSource,
        ledger: Journal | None,
        rows: Rows,
        progress: Progress,
    ) -> None:
        self._settings = config.train
        self._max_staleness = config.loss.max_staleness
        self._compares_log_probs = config.loss.needs_inference_logprobs
        self._ignored_fields = {
            name: reason
            for name, reason in _IGNORED_FIELDS.items()
            if name == "images" or config.distillation.mode == "none"
        }
        self._directory = config.train.output_dir / "set_aside"
        self._source = source
        self._ledger = ledger
        self._rows = rows
        self._progress = progress
        state = prepared.state
        self.step = state.step
        """Optimizer steps done, one for each batch trained on."""
        self.batch = state.batches
        """Number of the newest batch received."""
        self._position = state.position
        self.counters = Counter(state.counters)
        """Counts of what was set aside, by reason; see also `all_counters`."""
        self.normalizer = prepared.normalizer.state_dict()
        """State of the advantage normalizer after the newest batch that was trained on or skipped: what a
        checkpoint has to hold, while the normalizer itself may be batches ahead."""
        self._skips_in_a_row = 0
        self._warned: set[str] = set()
        self._store = QuarantineStore(self._directory, max_bytes=config.train.set_aside_max_bytes)
        self._share = QuarantineRate(config.train, state.set_aside_window)
        self.settled = self._counts()
        """Up to the newest batch whose outcome is known: what a checkpoint has. Later ones come again."""
        self._store.forget_after(self.batch)
        self.note_counts()

    @property
    def set_aside_share(self) -> float:
        """Groups set aside, of all groups of the last batches."""
        return self._share.share

    def _counts(self) -> SettledCounts:
        return SettledCounts(
            batches=self.batch,
            position=self._position,
            counters=dict(self.counters),
            set_aside_window=self._share.state,
        )

    def all_counters(self) -> dict[str, int]:
        """Everything set aside, by reason, and what was counted on the way in."""
        pruned = {"set_aside_pruned_total": self._store.pruned}
        return {**self.counters, **pruned, **self._source.counters()}

    def note_counts(self) -> None:
        """Tell whoever watches how far the run has come."""
        self._progress.counts = RunCounts(
            step=self.step,
            batches=self.settled.batches,
            possibly_lost=self._source.counters().get("intake_possibly_lost", 0),
        )

    def receive(self, incoming: IncomingBatch) -> None:
        """Number a batch that has come."""
        self.batch = incoming.number or self.batch + 1  # a journal numbers its batches itself
        self._position = incoming.position

    def sift(
        self, incoming: IncomingBatch, prepare: Callable[[IncomingBatch], PreparedStep]
    ) -> PreparedStep | None:
        """Prepare the batch at hand; one that cannot be trained on is passed over, kept and counted.

        Args:
            incoming: The batch.
            prepare: Returns what was prepared of it, or raises once the batch is kept.

        Returns:
            What to train on; None: it was passed over.

        Raises:
            TooManySkippedBatches: It is one of too many in a row.
            TooManySetAside: Of the last batches too large a share was left out; the batch is set aside.
        """
        if incoming.unreadable is not None:
            self._skip_unreadable(incoming, incoming.unreadable)
            return None
        prepared = prepare(incoming)
        batch = prepared.batch
        self._count(incoming, batch)
        if batch.empty_reason is not None:
            self.skip(incoming, batch, batch.empty_reason, counter="batches_without_signal")
            return None
        return None if self._skip_stale(incoming, batch) else prepared

    def forget(self, incoming: IncomingBatch, *, reason: str) -> None:
        """Roll back to before the batch at hand, which is kept: in the journal, or set aside without one."""
        self.batch, self.counters = self.settled.batches, Counter(self.settled.counters)
        self._share = QuarantineRate(self._settings, self.settled.set_aside_window)
        if self._ledger is not None:
            return
        self.counters["batches_unused"] += 1
        self.settled = replace(self.settled, counters=dict(self.counters))
        self._store.keep_batch(incoming.body, batch=self.batch + 1, reason=reason)

    def _count(self, incoming: IncomingBatch, batch: PreparedBatch) -> None:
        """Count what a prepared batch leaves out, and keep it.

        Raises:
            TooManySetAside: Of the last batches too large a share was left out; the batch is set aside.
        """
        self._warn_of_ignored_fields(incoming)
        self._warn_of_missing_sampled_tokens(batch)
        self.counters["set_aside_groups_total"] += len(batch.set_aside)
        self.counters["groups_without_spread_total"] += batch.groups_without_spread
        self.counters["groups_with_binary_masks_total"] += batch.groups_with_binary_masks
        self._store.keep_groups(batch.set_aside, batch=self.batch)
        reasons = [group.reason for group in batch.set_aside]
        try:
            alarm = self._share.add(groups=batch.groups + len(reasons), reasons=reasons)
        except TooManySetAside as error:
            self.set_aside(incoming, str(error))
            raise
        self.counters["set_aside_alarms_total"] += alarm

    def _warn_of_ignored_fields(self, incoming: IncomingBatch) -> None:
        """One warning a field and run: training without it is not what the environment wants."""
        for group in incoming.reply.groups:
            for name, reason in self._ignored_fields.items():
                if getattr(group, name) is not None:
                    self._warn_once(
                        name,
                        "Batch %d, environment %s: %s %s, and the groups are trained as if it were not "
                        "there.",
                        self.batch,
                        group.env_id,
                        name,
                        reason,
                    )

    def _warn_of_missing_sampled_tokens(self, batch: PreparedBatch) -> None:
        """One warning an environment and run: a teacher's fields that are shifted train all the same."""
        for env_id, share in batch.without_sampled_token.items():
            if share > _MOST_TOKENS:
                self._warn_once(
                    f"sampled token, environment {env_id}",
                    "Batch %d, environment %s: the teacher's candidates lack the sampled token at %.0f%% of "
                    "the trained positions. vLLM's prompt_logprobs always hold it: if they come from there, "
                    "distill_token_ids and distill_logprobs are probably shifted; entry t is for token t. A "
                    "teacher's own likeliest tokens alone may lack it",
                    self.batch,
                    env_id,
                    100 * share,
                )

    def _warn_once(self, about: str, message: str, *values: object) -> None:
        if about not in self._warned:
            logger.warning(message, *values)
        self._warned.add(about)

    def note_masked(self, share: float | None) -> None:
        """Count and, once a run, warn of a step most of whose tokens had no gradient.

        Args:
            share: Of its trained tokens; None: its loss masks none.
        """
        limit = self._settings.masked_alarm
        if share is None or limit is None or share <= limit:
            return
        self.counters["masked_alarms_total"] += 1
        self._warn_once(
            "masked",
            "Batch %d: the loss and its correction mask %.0f%% of the trained tokens (train.masked_alarm "
            "%g): the sampler's policy is far from the trainer's. Widen the bounds, or take fresher batches "
            "(atropos.prefetch, atropos.batch_size); further steps are counted in masked_alarms_total",
            self.batch,
            100 * share,
            limit,
        )

    def _skip_stale(self, incoming: IncomingBatch, batch: PreparedBatch) -> bool:
        """Skip a batch that is older than loss.max_staleness versions; return True if it is.

        Raises:
            TooManySkippedBatches: It is one of too many in a row.
        """
        age, limit = self.step - incoming.served_version, self._max_staleness
        if limit is None or incoming.served_version < 0 or age <= limit:
            return False
        self.counters["stale_groups_total"] += batch.groups
        reason = f"it is {count_of(age, 'version')} old (loss.max_staleness {limit})"
        self.skip(incoming, batch, reason, counter="batches_stale")
        return True

    def note_trained(self, batch: PreparedBatch) -> None:
        """The batch at hand was trained on: one more step."""
        self._skips_in_a_row = 0
        self.normalizer = batch.normalizer
        self.step += 1
        self._settle("trained")

    def skip(self, incoming: IncomingBatch, batch: PreparedBatch, reason: str, *, counter: str) -> None:
        """Pass over a batch that cannot be trained on.

        Args:
            incoming: The batch.
            batch: What was prepared of it.
            reason: Why it cannot be trained on.
            counter: What it counts as.

        Raises:
            TooManySkippedBatches: It is one of too many in a row.
        """
        self.counters[counter] += 1
        self._skips_in_a_row += 1
        self._pass_over(incoming, "skipped", reason)
        self.normalizer = batch.normalizer
        if self._skips_in_a_row >= self._settings.max_consecutive_skips:
            raise TooManySkippedBatches(
                f"{count_of(self._skips_in_a_row, 'batch')} in a row could not be trained "
                f"(train.max_consecutive_skips), the last because {reason}; they are kept in "
                f"{self._directory}"
            )

    def _skip_unreadable(self, incoming: IncomingBatch, why: str) -> None:
        """Keep a body that is no batch at all. Not a skip: the poller's patience bounds a row of them."""
        self.counters["batches_unreadable"] += 1
        self._pass_over(incoming, "set_aside", f"unreadable: {why}")

    def set_aside(self, incoming: IncomingBatch, reason: str) -> None:
        """Keep a batch that ends the run."""
        self._keep(incoming, reason)
        self._settle("set_aside", reason=reason)

    def accepts(self, mismatch: Mismatch | None, staleness: int | None) -> bool:
        """Whether to train on a batch whose log-probs differ like this; raises the alarm if there is one."""
        temperature = temperature_text(mismatch, staleness)
        if temperature is not None and self._compares_log_probs:
            self._warn_once("temperature", "Batch %d: %s", self.batch, temperature)
        unjudged = unjudged_text(mismatch, staleness, self._settings)
        if unjudged is not None:
            self._warn_once("unjudged", "Batch %d: %s", self.batch, unjudged)
        alarm = alarm_text(mismatch, staleness, self._settings)
        if alarm is None:
            return True
        self.counters["mismatch_alarms_total"] += 1
        logger.warning("Batch %d: %s", self.batch, alarm)
        return self._settings.mismatch_action == "warn"

    def refuse(self, incoming: IncomingBatch, mismatch: Mismatch | None, staleness: int | None) -> NoReturn:
        """Keep a batch that was not accepted and end the run.

        Raises:
            MismatchTooLarge: Always.
        """
        reason = alarm_text(mismatch, staleness, self._settings) or "its mismatch was not accepted"
        self.set_aside(incoming, reason)
        raise MismatchTooLarge(
            f"batch {self.batch}: {reason}. The batch is kept in {self._directory} and was not trained on; "
            "to go on all the same, set train.mismatch_action to warn"
        )

    def keep_unused(self, bodies: Iterable[bytes]) -> None:
        """Keep what was fetched early and nobody trained on."""
        for number, body in enumerate(bodies, start=self.batch + 1):
            self.counters["batches_unused"] += 1
            self._store.keep_batch(body, batch=number, reason="the run ended before it was trained on")

    def _pass_over(self, incoming: IncomingBatch, outcome: Outcome, reason: str) -> None:
        """Keep a batch that is not trained on, with a row that says so; the run goes on."""
        self._keep(incoming, reason)
        row: Row = {"kind": "skipped", "step": self.step, "batch": self.batch, "reason": reason}
        self._rows.write({**row, **self.all_counters()}, step=self.step)
        self._settle(outcome, reason=reason)

    def _keep(self, incoming: IncomingBatch, reason: str) -> None:
        self._store.keep_batch(incoming.body, batch=self.batch, reason=reason)

    def _settle(self, outcome: Outcome, *, reason: str | None = None) -> None:
        """Settle the outcome of the batch: from now on a checkpoint counts it."""
        self.settled = self._counts()
        if self._ledger is not None:
            step = self.step if outcome == "trained" else None
            self._ledger.settle(self.batch, outcome, step=step, reason=reason)
        self.note_counts()
