"""Our journaled source in the place of verl's data loader.

Verl saves its data loader's `state_dict()` with the weights, as `global_step_N/data.pt`, and only then names
that checkpoint the newest. Ours says which batches those weights were trained on, so the ledger is settled by
verl's own checkpoint: after a crash the journal is rewound to what the newest one counts. Nothing is lost,
and nothing is trained twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atropos_client.clock import running_time
from atropos_client.journal import Journal
from schemas import BatchReply
from trainer.checkpoints.format import CheckpointState
from trainer.config import TrainerConfig
from trainer.monitoring import Progress
from trainer.run.batch_tracker import BatchTracker
from trainer.run.metrics import Row, append_row, drop_later_rows
from trainer.run.places import journal_directory
from trainer.run.train_state import BEFORE_THE_FIRST_STEP
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.validation import ModelLimits
from trainer.sources.incoming import IncomingBatch, PreparedStep, poll_batch
from trainer.sources.live import AtroposSource, journal_limits

_STATE = "atropos"
_POLL_SECONDS = 0.5
_LOCK_SECONDS = 60.0
"""Seconds to wait for the processes of a run that was killed to let go of the journal."""


@dataclass
class _ResumePoint:
    state: CheckpointState
    normalizer: AdvantageNormalizer


class _Rows:
    """Rows of batches that were not trained on, in `metrics.jsonl`; verl has its own loggers for the rest."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, row: Row, *, step: int) -> None:
        append_row(self._path, row)


class AtroposBatches:
    """Gives the batches of an Atropos API to verl's trainer, one an optimizer step.

    Args:
        config: Ours.
        limits: Of the model.
        keep_all: Also hand out samples without a gradient: verl's own objectives count them.
        served_version: Asked in other threads: the version that environments sample from; -1: not known.
    """

    tracker: BatchTracker
    """Told what became of each batch; there after `start`."""

    def __init__(
        self,
        config: TrainerConfig,
        *,
        limits: ModelLimits,
        keep_all: bool,
        served_version: Callable[[], int],
    ) -> None:
        self._config = config
        self._limits = limits
        self._keep_all = keep_all
        self._served_version = served_version
        normalizer = AdvantageNormalizer(config.data.advantage_normalization)
        self._from = _ResumePoint(state=BEFORE_THE_FIRST_STEP, normalizer=normalizer)
        self._journal: Journal
        self._source: AtroposSource
        self._at_end = ExitStack()

    # For verl's checkpoints.

    def state_dict(self) -> dict[str, str]:
        """Return what the weights of this moment were trained on."""
        step = self.tracker.step
        update = {"step": step, "policy_version": step, "normalizer": self.tracker.normalizer}
        state = self._from.state.model_copy(update={**update, **vars(self.tracker.settled)})
        return {_STATE: state.model_dump_json()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on from there; before `start`."""
        self._from.state = CheckpointState.model_validate_json(state[_STATE])
        if self._from.state.normalizer:
            self._from.normalizer.load_state_dict(self._from.state.normalizer)

    @property
    def step(self) -> int:
        """Optimizer steps that batches were trained in before this start."""
        return self._from.state.step

    def start(self) -> None:
        """Open the journal at what the checkpoint counts, and begin to fetch.

        Raises:
            JournalError: The journal does not go on from the checkpoint, or another run has it.
            AtroposClientError: The API did not answer within atropos.ready_timeout.
        """
        metrics = self._config.train.output_dir / "metrics.jsonl"
        state = self._from.state
        self._journal = Journal.open(
            journal_directory(self._config),
            limits=journal_limits(self._config),
            wait=self._config.journal.shutdown_timeout + _LOCK_SECONDS,
            accept_loss=self._config.journal.accept_loss,
        )
        self._at_end.callback(self._journal.close)
        self._source = AtroposSource(
            self._config,
            self._journal,
            after=state.batches,
            step=lambda: self.tracker.step,
            served_version=self._served_version,
            prepare=self._prepare,
        )
        self._at_end.callback(self._source.stop)
        drop_later_rows(metrics, step=state.step, batch=state.batches)
        self.tracker = BatchTracker(
            self._config,
            self._from,
            source=self._source,
            ledger=self._journal,
            rows=_Rows(metrics),
            progress=Progress(),
        )
        self._source.start()

    def next(self, meanwhile: Callable[[], None]) -> tuple[IncomingBatch, PreparedBatch]:
        """Wait for a batch that can be trained on; others are passed over, kept and counted.

        Args:
            meanwhile: Called every half second of the wait.

        Raises:
            DeadlineExceeded: No batch came within atropos.batch_timeout; says who is late.
            TooManySkippedBatches, TooManySetAside: What comes cannot be trained on.
        """
        timeout = self._config.atropos.batch_timeout
        deadline = running_time() + timeout
        while True:
            meanwhile()
            incoming = poll_batch(self._source, seconds=_POLL_SECONDS, deadline=deadline, timeout=timeout)
            if incoming is None:
                continue
            self.tracker.receive(incoming)
            prepared = self.tracker.sift(incoming, self._prepared_step)
            if prepared is not None:
                return incoming, prepared.batch
            deadline = running_time() + timeout

    def prune(self, checkpoints: Path) -> None:
        """Let go of bodies that no checkpoint of verl's needs any more.

        Args:
            checkpoints: Directory of its `global_step_N`.
        """
        states = [path.parent / "data.pt" for path in checkpoints.glob("global_step_*/actor")]
        states = sorted((path for path in states if path.is_file()), key=_step_of)
        if self._config.journal.prune and states:
            oldest: dict[str, Any] = torch.load(states[0], weights_only=True)
            self._journal.prune(CheckpointState.model_validate_json(oldest[_STATE]).batches)

    def close(self) -> None:
        """Stop fetching; what was fetched and not trained on waits in the journal. Safe without `start`."""
        self._at_end.close()

    def _prepare(self, reply: BatchReply) -> PreparedStep:
        started = time.monotonic()
        batch = prepare_batch(
            reply,
            limits=self._limits,
            data=self._config.data,
            loss=self._config.loss,
            normalizer=self._from.normalizer,
            keep_all=self._keep_all,
        )
        return PreparedStep(batch=batch, micro_batches=[], seconds=time.monotonic() - started)

    def _prepared_step(self, incoming: IncomingBatch) -> PreparedStep:
        """Take what was prepared ahead; a batch that cannot be prepared is kept."""
        if incoming.failure is not None or incoming.prepared is None:
            self.tracker.set_aside(incoming, str(incoming.failure))
            raise incoming.failure or RuntimeError("a batch came unprepared")
        return incoming.prepared


def _step_of(path: Path) -> int:
    match = re.search(r"(\d+)$", path.parent.name)
    return int(match[1]) if match else -1
