"""Objectives with one importance ratio for each sequence; use them with `loss.reduction: sequence`."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import (
    LogMetrics,
    clip_counts,
    clipped_surrogate,
    finish_loss,
    sampler_log_ratio,
)
from trainer.options import GspoOptions, KlOptions

TOKEN_FORM_LIMIT = 10.0
"""Largest log-ratio of GSPO's token form."""


@loss(GspoOptions, needs_inference_logprobs=True, needs_ref_logprobs=KlOptions.has_penalty)
def gspo(inputs: LossInputs, options: GspoOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's clipped surrogate with the geometric mean of a sequence's token ratios as its ratio.

    ``loss = sum_t mask_t * (-min(s_t A_t, clip(s_t, 1 - epsilon_low, 1 + epsilon_high) A_t)
    [+ kl_coefficient * KL_t]) / denominator`` with ``s_t = exp(mean of logprob - inference_logprob over the
    trained tokens of the sequence)``; in the token form that is constant in the gradient, times
    ``exp(logprob_t - constant(logprob_t))``.

    Source: Group Sequence Policy Optimization, arXiv 2507.18071, equations 7 and 14.

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are required, at the same temperature as ``logprobs``.
        options: See there.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, ``ratio``, ``mismatch_kl``,
        ``sequence_ratio``, ``clipped_low``, ``clipped_high``, ``clipped``, and where known ``kl_ref``.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None, or ``ref_logprobs`` is with a KL penalty.
        DataError: if tokens are packed in one row and ``sequence_ids`` is None.
    """
    log_of_ratio = inputs.sequence_mean(sampler_log_ratio(inputs, "gspo"))
    if options.form == "token":
        logprobs = inputs.at_trained_tokens(inputs.logprobs)
        log_of_ratio = torch.clamp(log_of_ratio.detach() + logprobs - logprobs.detach(), max=TOKEN_FORM_LIMIT)
    ratio = torch.exp(log_of_ratio)
    advantages = inputs.at_trained_tokens(inputs.advantages)
    counts = clip_counts(inputs, ratio, advantages, options)
    counts = {**counts, "sequence_ratio": inputs.weighted_sum(ratio).detach()}
    return finish_loss(inputs, options, clipped_surrogate(ratio, advantages, options), counts)
