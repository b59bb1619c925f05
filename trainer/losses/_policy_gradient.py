"""Policy gradient with a truncated importance weight."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import LogMetrics, log_ratio, policy_metrics, reference_kl
from trainer.options import KlOptions, PolicyGradientOptions


@loss(
    PolicyGradientOptions,
    needs_inference_logprobs=True,
    needs_ref_logprobs=KlOptions.has_penalty,
)
def policy_gradient(inputs: LossInputs, options: PolicyGradientOptions) -> tuple[Tensor, LogMetrics]:
    """REINFORCE, corrected per token for what the sampler's policy was (truncated importance sampling).

    ``loss = sum_t mask_t * (-w_t * advantage_t * logprob_t [+ kl_coefficient * k3_t]) / denominator`` with
    ``w_t = min(exp(logprob_t - inference_logprob_t), ratio_cap)``, held constant in the gradient.

    The cap bounds the variance that a token the sampler found unlikely would bring (Ionides 2008, "Truncated
    Importance Sampling"; for the mismatch between inference engine and trainer: Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training").

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are required, at the same temperature as ``logprobs``.
        options: See there.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, ``ratio``, ``mismatch_kl``,
        ``capped`` (tokens whose weight was cut), and where known ``kl_ref``.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None, or ``ref_logprobs`` is with a KL penalty.
    """
    sampler = inputs.sampler_logprobs("policy_gradient")
    logprobs = inputs.at_trained_tokens(inputs.logprobs)
    ratio = torch.exp(log_ratio(logprobs.detach(), sampler))
    weight = torch.clamp(ratio, max=options.ratio_cap)
    per_token = -weight * inputs.at_trained_tokens(inputs.advantages) * logprobs
    penalty, kl_metrics = reference_kl(inputs, options.kl_coefficient)
    if penalty is not None:
        per_token = per_token + penalty
    metrics = policy_metrics(inputs) | kl_metrics
    metrics["capped"] = inputs.weighted_sum(ratio > options.ratio_cap)
    return inputs.reduce(per_token), metrics
