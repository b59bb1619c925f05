"""What the training thread computes: a batch prepared, and its optimizer step.

It decides nothing: what becomes of the batch, and when a step is given up, it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from schemas import BatchReply
from trainer.config import TrainerConfig
from trainer.mismatch import Mismatch
from trainer.preparation import PreparedStep, prepare_batch
from trainer.schedule import learning_rate
from trainer.setup import Prepared, make_step_runner
from trainer.step import StepGivenUp, StepResult


@dataclass(frozen=True, kw_only=True)
class ComputedStep:
    """A step that was computed; its result says whether it was applied."""

    result: StepResult
    staleness: int | None
    """Versions between the one that was served when the batch arrived and ours; None if that is not known."""
    learning_rate: float
    idle: float | None
    """See `trainer.metrics.StepTimes`."""


class Computation:
    """Prepares the batches of a run and computes their steps.

    Args:
        config: The run's configuration.
        prepared: What is computed with.
    """

    def __init__(self, config: TrainerConfig, prepared: Prepared) -> None:
        self._config = config
        self._prepared = prepared
        self._run_step = make_step_runner(config, prepared)
        self._idle_since: float | None = None
        self.weights_whole = True
        """Whether the weights are those of a step, none being under way."""

    def prepare(self, reply: BatchReply) -> PreparedStep:
        """Prepare a step; see `Trainer.prepare`."""
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

    def compute(
        self,
        prepared: PreparedStep,
        *,
        step: int,
        served_version: int,
        accepts: Callable[[Mismatch | None, int | None], bool],
        give_up: Callable[[], bool],
    ) -> ComputedStep:
        """Run the optimizer step of a batch.

        Args:
            prepared: The batch; it has at least one micro-batch.
            step: Steps done before this one.
            served_version: See `IncomingBatch`.
            accepts: Asked with the mismatch and the staleness before the weights change.
            give_up: Asked before each micro-batch.

        Raises:
            StepGivenUp: `give_up` said so.
        """
        rate = learning_rate(self._config.optimizer, step, self._config.train.steps)
        for group in self._prepared.optimizer.param_groups:
            group["lr"] = rate
        staleness = step - served_version if served_version >= 0 else None
        idle = time.monotonic() - self._idle_since if self._idle_since is not None else None
        self.weights_whole = False
        try:
            result = self._run_step(
                prepared.micro_batches,
                accepts=lambda mismatch: accepts(mismatch, staleness),
                give_up=give_up,
            )
        except StepGivenUp:
            self.weights_whole = True  # those before the step
            raise
        self.weights_whole = True
        self.begin_idling()
        return ComputedStep(result=result, staleness=staleness, learning_rate=rate, idle=idle)

    def begin_idling(self) -> None:
        """Note that the time from now until the next step is computed is idle."""
        self._idle_since = time.monotonic()
