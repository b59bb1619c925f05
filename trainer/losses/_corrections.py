"""Weights and masks against the mismatch of sampler and trainer, whatever the loss.

Sources: truncated importance sampling, Yao et al. 2025 (tokens) and arXiv 2512.23075 (sequences, rejection);
IcePop, arXiv 2510.18855; the off-policy sequence mask, DeepSeek-V3.2, arXiv 2512.02556.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.losses._divergences import LOG_RATIO_LIMIT, k3, log_ratio
from trainer.losses._inputs import LossInputs
from trainer.options import CorrectionOptions


@torch.no_grad()
def correction_weights(inputs: LossInputs, options: CorrectionOptions) -> Tensor:
    """Weigh each token by how much the trainer's policy differs from the sampler's.

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are required.
        options: See there.

    Returns:
        The weights, 0 or more, in the inputs' shape; without gradient.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None.
        DataError: if a sequence is spoken of, tokens are packed in one row, and ``sequence_ids`` is None.
    """
    sampler = inputs.sampler_logprobs("loss.correction")
    difference = log_ratio(inputs.at_trained_tokens(inputs.logprobs), sampler)
    weights = _importance_weights(inputs, difference, options)
    if options.reject != "none":
        weights = weights * _is_kept(inputs, difference, options)
    if options.off_policy_limit is not None:
        stays = -inputs.sequence_mean(difference) <= options.off_policy_limit
        weights = weights * (stays | (inputs.at_trained_tokens(inputs.advantages) >= 0))
    return weights


def _importance_weights(inputs: LossInputs, difference: Tensor, options: CorrectionOptions) -> Tensor:
    if options.weight == "token_tis":
        return torch.exp(difference).clamp(max=options.ratio_cap)
    if options.weight == "sequence_tis":
        of_sequence = inputs.sequence_sum(difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return torch.exp(of_sequence).clamp(max=options.ratio_cap)
    if options.weight == "icepop":
        ratio = torch.exp(difference)
        kept = (ratio >= options.icepop_low) & (ratio <= options.icepop_high)
        return torch.where(kept, ratio, torch.zeros_like(ratio))
    return torch.ones_like(difference)


def _is_kept(inputs: LossInputs, difference: Tensor, options: CorrectionOptions) -> Tensor:
    """True where the estimate of the token, or of its sequence, is within its bounds."""
    estimate = {"k1": -difference, "k2": 0.5 * difference.square(), "k3": k3(difference)}[
        options.reject_estimator
    ]
    if options.reject == "sequence_sum":
        estimate = inputs.sequence_sum(estimate)
    elif options.reject == "sequence_mean":
        estimate = inputs.sequence_mean(estimate)
    elif options.reject == "sequence_max":
        estimate = inputs.sequence_max(estimate)
    lowest = -math.inf
    if options.reject_estimator == "k1":
        lowest = -options.reject_above if options.reject_below is None else options.reject_below
    return (estimate >= lowest) & (estimate <= options.reject_above)
