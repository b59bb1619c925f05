"""Surrogate objectives that bound the importance ratio of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import (
    LogMetrics,
    clip_counts,
    finish_loss,
    sampler_log_ratio,
)
from trainer.options import KlOptions, PpoClipOptions


@loss(PpoClipOptions, needs_inference_logprobs=True, needs_ref_logprobs=KlOptions.has_penalty)
def ppo_clip(inputs: LossInputs, options: PpoClipOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's pessimistic bound, per token.

    ``loss = sum_t mask_t * (-min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)
    [+ kl_coefficient * KL_t]) / denominator`` with ``r_t = exp(logprob_t - inference_logprob_t)``; with
    `two_sided` the first ``r_t`` is ``min(r_t, two_sided)``, with `dual_clip` and ``A_t < 0`` the term is at
    most ``-dual_clip A_t``.

    Sources: Schulman et al. 2017, equation 7; two epsilons: DAPO (Yu et al. 2025), "clip-higher"; dual clip:
    Ye et al. 2019, arXiv 1912.09729; two-sided: INTELLECT-2, arXiv 2505.07291.

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are required, at the same temperature as ``logprobs``.
        options: See there.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, ``ratio``, ``mismatch_kl``,
        ``clipped_low``, ``clipped_high``, ``clipped`` (both), and where known ``kl_ref``; ``clipped_dual``
        (tokens of negative advantage that `dual_clip` or `two_sided` stops) if either is set.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None, or ``ref_logprobs`` is with a KL penalty.
    """
    ratio = torch.exp(sampler_log_ratio(inputs, "ppo_clip"))
    advantages = inputs.at_trained_tokens(inputs.advantages)
    free = ratio if options.two_sided is None else torch.clamp(ratio, max=options.two_sided)
    bounded = torch.clamp(ratio, options.lowest, options.highest)
    terms = -torch.minimum(free * advantages, bounded * advantages)
    if options.dual_clip is not None:
        terms = torch.where(advantages < 0, torch.minimum(terms, -options.dual_clip * advantages), terms)
    counts = clip_counts(inputs, ratio, advantages, options)
    limits = [limit for limit in (options.dual_clip, options.two_sided) if limit is not None]
    if limits:
        counts = {**counts, "clipped_dual": inputs.weighted_sum((ratio > min(limits)) & (advantages < 0))}
    return finish_loss(inputs, options, terms, counts)
