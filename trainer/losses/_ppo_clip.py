"""The clipped surrogate objective of PPO, with separate bounds below and above."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import LogMetrics, log_ratio, policy_metrics, reference_kl
from trainer.options import KlOptions, PpoClipOptions


@loss(PpoClipOptions, needs_inference_logprobs=True, needs_ref_logprobs=KlOptions.has_penalty)
def ppo_clip(inputs: LossInputs, options: PpoClipOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's pessimistic bound, per token.

    ``loss = sum_t mask_t * (-min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)
    [+ kl_coefficient * k3_t]) / denominator`` with ``r_t = exp(logprob_t - inference_logprob_t)``.

    Only two of the four regions are clipped (and have no gradient)::

                          r < 1 - epsilon_low     r > 1 + epsilon_high
        advantage > 0     free                    clipped
        advantage < 0     clipped                 free: A = -1, r = 2 gives a loss of 2.0, with gradient

    Sources: Schulman et al. 2017, equation 7; two epsilons: DAPO (Yu et al. 2025), "clip-higher".

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are required, at the same temperature as ``logprobs``.
        options: See there.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, ``ratio``, ``mismatch_kl``,
        ``clipped_low``, ``clipped_high``, ``clipped`` (both), and where known ``kl_ref``.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None, or ``ref_logprobs`` is with a KL penalty.
    """
    lowest, highest = 1.0 - options.epsilon_low, 1.0 + options.epsilon_high
    sampler = inputs.sampler_logprobs("ppo_clip")
    advantages = inputs.at_trained_tokens(inputs.advantages)
    ratio = torch.exp(log_ratio(inputs.at_trained_tokens(inputs.logprobs), sampler))
    bounded_ratio = torch.clamp(ratio, lowest, highest)
    per_token = -torch.minimum(ratio * advantages, bounded_ratio * advantages)
    penalty, kl_metrics = reference_kl(inputs, options.kl_coefficient)
    if penalty is not None:
        per_token = per_token + penalty
    metrics = policy_metrics(inputs) | kl_metrics
    metrics["clipped_low"] = inputs.weighted_sum((ratio < lowest) & (advantages < 0))
    metrics["clipped_high"] = inputs.weighted_sum((ratio > highest) & (advantages > 0))
    metrics["clipped"] = metrics["clipped_low"] + metrics["clipped_high"]
    return inputs.reduce(per_token), metrics
