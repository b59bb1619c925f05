"""The whole objective of a micro-batch: the loss of the rewards, a teacher's term, and the entropy's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.config import TrainerConfig
from trainer.errors import DataError
from trainer.losses import LossInputs, teacher_divergence
from trainer.model.token_logprobs import TokenLogProbs
from trainer.packing import MicroBatch
from trainer.run.entropy_bonus import EntropyBonus


class Objective:
    """Turns a micro-batch and the policy's log-probs into a scalar to differentiate.

    ``staleness_discount^age * (reward_coefficient * loss + coefficient * sum_t mask_t KL_t / denominator -
    entropy bonus)``

    Args:
        config: Its sections `loss` and `distillation`.
        entropy_bonus: The run's.
    """

    def __init__(self, config: TrainerConfig, entropy_bonus: EntropyBonus) -> None:
        self._loss = config.loss.bound
        self._staleness_discount = config.loss.staleness_discount
        self._distillation = config.distillation
        self._entropy_bonus = entropy_bonus

    @property
    def differentiates_entropy(self) -> bool:
        """Whether the entropy of the step to come needs a gradient."""
        return self._entropy_bonus.coefficient > 0

    def __call__(
        self, batch: MicroBatch, scores: TokenLogProbs, *, statistics: Any, staleness: int | None
    ) -> tuple[Tensor, LossInputs, dict[str, Tensor]]:
        """Return the objective (0-dim), what it was computed from, and sums for the metrics.

        Args:
            batch: A micro-batch.
            scores: The policy's, of its tokens.
            statistics: See `LossInputs`.
            staleness: See `LossInputs`.
        """
        inputs = LossInputs(
            logprobs=scores.logprobs,
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
            inference_logprobs=batch.inference_logprobs,
            ref_logprobs=batch.ref_logprobs,
            denominator=batch.denominator,
            sequence_ids=batch.sequence_ids,
            sequence_count=batch.sequence_count,
            statistics=statistics,
            staleness=staleness,
        )
        loss, metrics = self._loss(inputs)
        loss, teacher_metrics = self._add_teacher(loss, inputs, batch, scores)
        loss, entropy_metrics = self._entropy_bonus.add(loss, inputs, scores.entropy)
        loss = loss * self._staleness_discount ** max(0, staleness or 0)
        return loss, inputs, {**metrics, **teacher_metrics, **entropy_metrics}

    def _add_teacher(
        self, loss: Tensor, inputs: LossInputs, batch: MicroBatch, scores: TokenLogProbs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self._distillation
        if settings.mode not in ("forward_kl", "reverse_kl"):
            return loss, {}
        if scores.candidates is None or batch.teacher_logprobs is None:
            raise DataError(
                f"distillation.mode {settings.mode} needs a teacher's candidates in every micro-batch"
            )
        divergence = teacher_divergence(scores.candidates, batch.teacher_logprobs, settings.mode)
        metrics = {"kl_teacher": inputs.weighted_sum(divergence).detach()}
        if settings.reward_coefficient != 1:
            loss = settings.reward_coefficient * loss
        return loss + settings.coefficient * inputs.reduce(divergence), metrics
