"""Policy gradients whose importance weight is bounded and held constant: no token loses its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import LogMetrics, finish_loss, sampler_log_ratio
from trainer.options import CispoOptions, KlOptions, PolicyGradientOptions


@loss(PolicyGradientOptions, needs_inference_logprobs=True, needs_ref_logprobs=KlOptions.has_penalty)
def policy_gradient(inputs: LossInputs, options: PolicyGradientOptions) -> tuple[Tensor, LogMetrics]:
    """REINFORCE, corrected per token for what the sampler's policy was (truncated importance sampling).

    ``loss = sum_t mask_t * (-w_t * advantage_t * logprob_t [+ kl_coefficient * KL_t]) / denominator`` with
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
    ratio = torch.exp(sampler_log_ratio(inputs, "policy_gradient").detach())
    weight = torch.clamp(ratio, max=options.ratio_cap)
    terms = -weight * inputs.at_trained_tokens(inputs.advantages) * inputs.at_trained_tokens(inputs.logprobs)
    counts = {"capped": inputs.weighted_sum(ratio > options.ratio_cap)}
    return finish_loss(inputs, options, terms, counts)


@loss(CispoOptions, needs_inference_logprobs=True, needs_ref_logprobs=KlOptions.has_penalty)
def cispo(inputs: LossInputs, options: CispoOptions) -> tuple[Tensor, LogMetrics]:
    """Policy gradient whose importance weight is clipped on both sides and held constant.

    ``loss = sum_t mask_t * (-w_t * advantage_t * logprob_t [+ kl_coefficient * KL_t]) / denominator`` with
    ``w_t = clip(exp(logprob_t - inference_logprob_t), 1 - epsilon_low, 1 + epsilon_high)``. Unlike PPO's clip
    it takes no token's gradient away.

    Source: MiniMax-M1, arXiv 2506.13585, which leaves the lower bound out; ScaleRL, arXiv 2510.13786.

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are required, at the same temperature as ``logprobs``.
        options: See there.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, ``ratio``, ``mismatch_kl``,
        ``clipped`` (tokens whose weight was changed), and where known ``kl_ref``.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None, or ``ref_logprobs`` is with a KL penalty.
    """
    ratio = torch.exp(sampler_log_ratio(inputs, "cispo").detach())
    weight = torch.clamp(ratio, 1.0 - options.epsilon_low, 1.0 + options.epsilon_high)
    terms = -weight * inputs.at_trained_tokens(inputs.advantages) * inputs.at_trained_tokens(inputs.logprobs)
    return finish_loss(inputs, options, terms, {"clipped": inputs.weighted_sum(weight != ratio)})
