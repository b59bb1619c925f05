"""Objectives that hold back the few tokens which cost the policy most of its entropy.

Those are the tokens of the largest covariance of advantage and log-prob (Cui et al. 2025, "The Entropy
Mechanism of Reinforcement Learning", arXiv 2505.22617). In a run the log-probs are the sampler's, both
where the step's means and threshold are taken and where tokens are compared with them: those are known before
any micro-batch is computed, so that the choice does not depend on how the step is cut. A direct call without
statistics takes the trainer's, as the paper does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import (
    LogMetrics,
    clipped_surrogate,
    finish_loss,
    own_log_ratio,
    sampler_log_ratio,
)
from trainer.options import ClipCovOptions, KlCovOptions


@dataclass(frozen=True, kw_only=True)
class StepCovariance:
    """Inputs of the covariance of a token, and which covariances are large."""

    mean_advantage: Tensor
    """0-dim, over the step's trained tokens."""
    mean_logprob: Tensor
    """0-dim, over the step's trained tokens."""
    threshold: Tensor
    """0-dim: tokens whose covariance is at least this are held back."""

    def of_tokens(self, inputs: LossInputs, logprobs: Tensor) -> Tensor:
        """``(advantage - mean) (logprob - mean)`` per token, without gradient.

        In the precision of the means, so that a token has the value here that the threshold was taken from.
        """
        precision = self.mean_logprob.dtype
        advantages = inputs.at_trained_tokens(inputs.advantages).to(precision)
        logprobs = inputs.at_trained_tokens(logprobs).detach().to(precision)
        return (advantages - self.mean_advantage.to(advantages)) * (logprobs - self.mean_logprob.to(logprobs))


@torch.no_grad()
def _step_covariance(
    inputs: LossInputs, options: ClipCovOptions | KlCovOptions, eligible: Tensor | None = None
) -> StepCovariance:
    """Take the statistics of a step, and the threshold that `covariance_share` of its tokens reach.

    Args:
        inputs: All trained tokens of the step.
        options: See there.
        eligible: False for tokens that cannot be held back; None: all that are trained can.
    """
    count = inputs.mask.sum()
    means = StepCovariance(
        mean_advantage=inputs.weighted_sum(inputs.advantages) / count,
        mean_logprob=inputs.weighted_sum(inputs.logprobs) / count,
        threshold=count.new_tensor(math.inf),
    )
    covariance = means.of_tokens(inputs, inputs.logprobs)
    candidates = inputs.trained if eligible is None else inputs.trained & eligible
    if isinstance(options, ClipCovOptions):
        candidates = (
            candidates & (covariance > options.covariance_low) & (covariance < options.covariance_high)
        )
    values = covariance[candidates]
    held_back = min(len(values), max(1, int(options.covariance_share * int(inputs.trained.sum()))))
    if not held_back:
        return means
    threshold = torch.topk(values, held_back).values[-1]
    return StepCovariance(
        mean_advantage=means.mean_advantage, mean_logprob=means.mean_logprob, threshold=threshold
    )


def _has_largest_covariance(
    inputs: LossInputs, options: ClipCovOptions | KlCovOptions, eligible: Tensor | None = None
) -> Tensor:
    """True for the tokens that reach the step's threshold, under the log-probs that it was taken with.

    Args:
        inputs: Those of the loss, which has the sampler's log-probs.
        options: See there.
        eligible: See `_step_covariance`; without the step's statistics only.
    """
    statistics: StepCovariance | None = inputs.statistics
    logprobs = inputs.inference_logprobs
    if statistics is None or logprobs is None:
        statistics, logprobs = _step_covariance(inputs, options, eligible), inputs.logprobs
    else:
        eligible = None  # the step's choice was made without it
    covariance = statistics.of_tokens(inputs, logprobs)
    large = inputs.trained & (covariance >= statistics.threshold)
    if isinstance(options, ClipCovOptions):
        large = large & (covariance < options.covariance_high)
    return large if eligible is None else large & eligible


@loss(ClipCovOptions, step_statistics=_step_covariance)
def clip_cov(inputs: LossInputs, options: ClipCovOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's clipped surrogate without the tokens of the largest covariance of advantage and log-prob.

    ``-keep_t min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)``; ``keep_t`` is 0 for the
    `covariance_share` of the step's tokens whose covariance is largest between `covariance_low` and
    `covariance_high`. The paper draws among those in between at random; here it is always the largest.

    Source: arXiv 2505.22617, equation 11. Own metrics: ``clipped_low``, ``clipped_high``, ``clipped``,
    ``masked``. Without ``statistics`` these tokens are the whole step, and those that the clip stops are not
    chosen from.
    """
    ratio = torch.exp(own_log_ratio(inputs, options, "clip_cov"))
    terms, counts = clipped_surrogate(inputs, ratio, options)
    stopped = terms > -ratio * inputs.at_trained_tokens(inputs.advantages)
    held_back = _has_largest_covariance(inputs, options, ~stopped)
    terms = torch.where(held_back, torch.zeros_like(terms), terms)
    return finish_loss(inputs, options, terms, counts, kept=~held_back)


@loss(KlCovOptions, step_statistics=_step_covariance)
def kl_cov(inputs: LossInputs, options: KlCovOptions) -> tuple[Tensor, LogMetrics]:
    """Plain surrogate with a penalty on the tokens of the largest covariance of advantage and log-prob.

    ``-r_t A_t + covariance_penalty |d_t| large_t`` with ``d_t = logprob_t - inference_logprob_t`` and
    ``r_t = exp(d_t)``; ``large_t`` is 1 for the `covariance_share` of the step's tokens whose covariance is
    largest.

    Source: arXiv 2505.22617, equation 12. Own metric: ``penalized``. Without ``statistics`` these tokens are
    the whole step.
    """
    difference = sampler_log_ratio(inputs, "kl_cov")
    large = _has_largest_covariance(inputs, options)
    terms = -torch.exp(own_log_ratio(inputs, options, "kl_cov")) * inputs.at_trained_tokens(inputs.advantages)
    terms = terms + options.covariance_penalty * difference.abs() * large
    return finish_loss(inputs, options, terms, {"penalized": inputs.weighted_sum(large)})
