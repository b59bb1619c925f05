"""Our journaled source in the place of verl's data loader.

Verl saves its data loader's `state_dict()` with the weights, as `global_step_N/data.pt`, and only then names
that checkpoint the newest. Ours says which batches those weights were trained on, so the ledger is settled by
verl's own checkpoint: after a crash the journal is rewound to what the newest one counts. Nothing is lost,
and nothing is trained twice.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import ExitStack
from functools import partial

from atropos_client.clock import running_time
from atropos_client.journal import Journal
from trainer.checkpoints.format import CheckpointState
from trainer.config import TrainerConfig
from trainer.monitoring import Progress
from trainer.publish import Publisher
from trainer.run.batch_tracker import BatchTracker
from trainer.run.metrics import Row
from trainer.run.places import journal_directory
from trainer.run.train_state import BEFORE_THE_FIRST_STEP
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.validation import ModelLimits
from trainer.sources.incoming import IncomingBatch, PreparedStep, poll_batch
from trainer.sources.live import AtroposSource, journal_limits

logger = logging.getLogger(__name__)

_STATE = "atropos"


class AtroposBatches:
    """Gives the batches of an Atropos API to verl's trainer, one an optimizer step.

    With `keep_all` also samples without a gradient: verl's own objectives count them. Verl keeps so many
    `checkpoints`; None: all. It is also what its `BatchTracker` goes on from (`state`, `normalizer`), and
    what it writes to.
    """

    tracker: BatchTracker
    """Told what became of each batch; there after `start`, as the journal and the source are."""
    _journal: Journal
    _source: AtroposSource
    _publisher: Publisher | None

    def __init__(
        self, config: TrainerConfig, *, limits: ModelLimits, keep_all: bool, checkpoints: int | None
    ) -> None:
        self.state = BEFORE_THE_FIRST_STEP
        self.normalizer = AdvantageNormalizer(config.data.advantage_normalization)
        self._config = config
        self._prepare = partial(
            prepare_batch,
            limits=limits,
            data=config.data,
            loss=config.loss,
            normalizer=self.normalizer,
            keep_all=keep_all,
        )
        self._kept: deque[int] = deque(maxlen=checkpoints)
        self._at_end = ExitStack()

    def state_dict(self) -> dict[str, str]:
        """Return what the weights of this moment were trained on, for verl's checkpoint."""
        step = self.tracker.step
        update = {"step": step, "policy_version": step, "normalizer": self.tracker.normalizer}
        state = self.state.model_copy(update={**update, **vars(self.tracker.settled)})
        return {_STATE: state.model_dump_json()}

    def load_state_dict(self, saved: dict[str, str]) -> None:
        """Go on from there, before `start`; nothing changes where a loader of verl's saved it."""
        if _STATE in saved:
            self.state = CheckpointState.model_validate_json(saved[_STATE])
            self.normalizer.load_state_dict(self.state.normalizer)

    def start(self, publisher: Publisher | None) -> None:
        """Open the journal at what the checkpoint counts, and begin to fetch; tend the publisher in waits.

        Raises:
            JournalError: The journal does not go on from the checkpoint, or another run has it.
            AtroposClientError: The API did not answer within atropos.ready_timeout.
        """
        config = self._config
        self._publisher = publisher
        self._journal = self._at_end.enter_context(
            Journal.open(
                journal_directory(config),
                limits=journal_limits(config),
                wait=config.journal.shutdown_timeout + 60,  # for a run that was killed to let go of it
                accept_loss=config.journal.accept_loss,
            )
        )
        self._source = AtroposSource(
            config,
            self._journal,
            after=self.state.batches,
            step=lambda: self.tracker.step,
            served_version=lambda: -1 if publisher is None else publisher.sampled_version,
            prepare=lambda reply: PreparedStep(batch=self._prepare(reply), micro_batches=[], seconds=0),
        )
        self._at_end.callback(self._source.stop)
        self.tracker = BatchTracker(
            config, self, source=self._source, ledger=self._journal, rows=self, progress=Progress()
        )
        self._source.start()

    def next(self) -> tuple[IncomingBatch, PreparedBatch]:
        """Wait for a batch that can be trained on; others are passed over, kept and counted.

        Raises:
            DeadlineExceeded: No batch came within atropos.batch_timeout; says who is late.
            TooManySkippedBatches, TooManySetAside: What comes cannot be trained on.
        """
        timeout = self._config.atropos.batch_timeout
        deadline = running_time() + timeout
        while True:
            if self._publisher is not None:
                self._publisher.tend(self.tracker.step)
            incoming = poll_batch(self._source, seconds=0.5, deadline=deadline, timeout=timeout)
            if incoming is None:
                continue
            self.tracker.receive(incoming)
            prepared = self.tracker.sift(incoming, self._prepared_step)
            if prepared is not None:
                return incoming, prepared.batch
            deadline = running_time() + timeout

    def write(self, row: Row, *, step: int) -> None:
        """Say that a batch was not trained on; the ledger says it too, and verl has loggers for the rest."""
        logger.warning("batch %s was not trained on: %s", row["batch"], row["reason"])

    def note_checkpoint(self) -> None:
        """Let go of bodies that none of the checkpoints that verl keeps needs any more."""
        self._kept.append(self.tracker.settled.batches)
        if self._config.journal.prune and len(self._kept) == self._kept.maxlen:
            self._journal.prune(self._kept[0])

    def close(self) -> None:
        """Stop fetching; what was fetched and not trained on waits in the journal. Safe without `start`."""
        self._at_end.close()

    def _prepared_step(self, incoming: IncomingBatch) -> PreparedStep:
        """Take what was prepared ahead; a batch that cannot be prepared is kept."""
        if incoming.failure is not None or incoming.prepared is None:
            self.tracker.set_aside(incoming, str(incoming.failure))
            raise incoming.failure or RuntimeError("a batch came unprepared")
        return incoming.prepared
