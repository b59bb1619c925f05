"""Objectives with one importance ratio for each sequence; use them with `loss.reduction: sequence`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._divergences import LOG_RATIO_LIMIT
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import (
    LogMetrics,
    clipped_surrogate,
    finish_loss,
    own_log_ratio,
    policy_gradient_terms,
)
from trainer.options import GmpoOptions, GspoOptions, LuspoOptions, VespoOptions

TOKEN_FORM_LIMIT = 10.0
"""Largest log-ratio of GSPO's token form."""
LOWEST_LOG_WEIGHT = math.log(1e-8)
"""Smallest log-ratio of a whole sequence in VESPO."""


@loss(GspoOptions)
def gspo(inputs: LossInputs, options: GspoOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's clipped surrogate with the geometric mean of a sequence's token ratios as its ratio.

    ``-min(s_t A_t, clip(s_t, 1 - epsilon_low, 1 + epsilon_high) A_t)`` with ``s_t = exp(mean of logprob -
    inference_logprob over the trained tokens of the sequence)``; in the token form that is constant in the
    gradient, times ``exp(logprob_t - constant(logprob_t))``.

    Source: Group Sequence Policy Optimization, arXiv 2507.18071, equations 7 and 14. Own metrics:
    ``sequence_ratio``, ``clipped_low``, ``clipped_high``, ``clipped``.
    """
    log_of_ratio = inputs.sequence_mean(own_log_ratio(inputs, options, "gspo"))
    if options.form == "token":
        logprobs = inputs.at_trained_tokens(inputs.logprobs)
        log_of_ratio = torch.clamp(log_of_ratio.detach() + logprobs - logprobs.detach(), max=TOKEN_FORM_LIMIT)
    ratio = torch.exp(log_of_ratio)
    terms, counts = clipped_surrogate(inputs, ratio, options)
    counts["sequence_ratio"] = inputs.weighted_sum(ratio).detach()
    return finish_loss(inputs, options, terms, counts)


@loss(LuspoOptions)
def luspo(inputs: LossInputs, options: LuspoOptions) -> tuple[Tensor, LogMetrics]:
    """GSPO's term times the sequence's trained tokens, so that a long answer's tokens count as a short one's.

    ``-n min(s A_t, clip(s, 1 - epsilon_low, 1 + epsilon_high) A_t)`` with ``s`` as in `gspo` and ``n`` the
    trained tokens of the sequence; meant for `loss.reduction: sequence`, which divides by ``n`` again.

    Source: Length-Unbiased Sequence Policy Optimization, arXiv 2602.05261. Own metrics: as `gspo`.
    """
    ratio = torch.exp(inputs.sequence_mean(own_log_ratio(inputs, options, "luspo")))
    terms, counts = clipped_surrogate(inputs, ratio, options)
    counts["sequence_ratio"] = inputs.weighted_sum(ratio).detach()
    return finish_loss(inputs, options, inputs.sequence_sum(inputs.trained) * terms, counts)


@loss(GmpoOptions)
def gmpo(inputs: LossInputs, options: GmpoOptions) -> tuple[Tensor, LogMetrics]:
    """Geometric mean of a sequence's token ratios, each clipped by itself before it enters the mean.

    ``-A exp(mean of e_t over the sequence)`` with ``A`` the sequence's mean advantage, ``d_t = logprob_t -
    inference_logprob_t``, and ``e_t = min(d_t, epsilon_high)`` under a positive ``A_t``, ``max(d_t,
    -epsilon_low)`` under a negative one, ``0`` under none.

    Source: Geometric-Mean Policy Optimization, arXiv 2507.20673; its reduction is `loss.reduction: sequence`.
    Own metrics: ``sequence_ratio``, ``clipped``.
    """
    difference = own_log_ratio(inputs, options, "gmpo")
    advantages = inputs.at_trained_tokens(inputs.advantages)
    sign = torch.sign(advantages)
    bounded = torch.clamp(difference, -options.epsilon_low, options.epsilon_high)
    clipped = sign * torch.minimum(sign * difference, sign * bounded)
    ratio = torch.exp(inputs.sequence_mean(clipped))
    counts = {
        "clipped": inputs.weighted_sum((clipped != difference) & (sign != 0)),
        "sequence_ratio": inputs.weighted_sum(ratio).detach(),
    }
    return finish_loss(inputs, options, -inputs.sequence_mean(advantages) * ratio, counts)


@loss(VespoOptions)
def vespo(inputs: LossInputs, options: VespoOptions) -> tuple[Tensor, LogMetrics]:
    """Policy gradient weighted by a smooth function of the whole sequence's importance ratio.

    ``-phi A_t logprob_t`` with ``phi = e^rate w^power e^(-rate w)``, held constant, and ``w = exp(sum of
    logprob - inference_logprob over the sequence)``, held to 1e-8 .. e^20. ``phi`` is 1 at ``w = 1``; it goes
    to 0 where the sequence became much rarer or much likelier.

    Source: Variational Sequence-Level Soft Policy Optimization, arXiv 2602.10693. Own metric:
    ``sequence_weight`` (phi).
    """
    total = inputs.sequence_sum(own_log_ratio(inputs, options, "vespo").detach())
    log_weight = total.clamp(LOWEST_LOG_WEIGHT, LOG_RATIO_LIMIT)
    positive = inputs.at_trained_tokens(inputs.advantages) >= 0
    ones = torch.ones_like(log_weight)
    power = torch.where(positive, options.power_positive * ones, options.power_negative)
    rate = torch.where(positive, options.rate_positive * ones, options.rate_negative)
    phi = torch.exp(rate + power * log_weight - rate * torch.exp(log_weight))
    counts = {"sequence_weight": inputs.weighted_sum(phi)}
    return finish_loss(inputs, options, policy_gradient_terms(inputs, phi), counts)
