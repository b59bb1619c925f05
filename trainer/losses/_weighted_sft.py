"""Advantage-weighted supervised fine-tuning: the default loss."""

from __future__ import annotations

from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import LogMetrics, finish_loss
from trainer.options import KlOptions, ObjectiveOptions


@loss(
    ObjectiveOptions,
    needs_inference_logprobs=ObjectiveOptions.needs_sampler,
    needs_ref_logprobs=KlOptions.has_penalty,
)
def weighted_sft(inputs: LossInputs, options: ObjectiveOptions) -> tuple[Tensor, LogMetrics]:
    """Cross-entropy of each token, weighted by its advantage.

    ``loss = sum_t mask_t * (-logprob_t * advantage_t [+ kl_coefficient * KL_t]) / denominator``

    With advantages of 1 this is supervised fine-tuning; with on-policy samples its gradient is REINFORCE's.
    It corrects for no difference between sampler and trainer unless `correction` says so. Source: the
    Atropos integration for VERL, "token-level advantage-weighted SFT";
    :func:`trainer.compute_advantage_weighted_sft_loss` is the same loss with the model's forward pass in
    front.

    Args:
        inputs: Token-aligned; without a correction ``inference_logprobs`` are only measured.
        options: See there.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, and where known ``ratio``,
        ``mismatch_kl``, ``kl_ref``.

    Raises:
        MissingLogProbsError: if a KL penalty is asked for and ``ref_logprobs`` is None.
    """
    terms = -inputs.at_trained_tokens(inputs.logprobs) * inputs.at_trained_tokens(inputs.advantages)
    return finish_loss(inputs, options, terms)
