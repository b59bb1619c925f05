"""Objectives that mask a token once its probability has moved too far in the direction it is pushed in."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import (
    LogMetrics,
    finish_loss,
    own_log_ratio,
    policy_gradient_terms,
    sampler_log_ratio,
)
from trainer.options import DppoKlOptions, DppoTvOptions, IpoOptions, PrimeOptions

PROBABILITY_EPSILON = 1e-8
"""Keeps the binary KL of a token of probability 1 finite; the source's constant."""


@loss(DppoTvOptions)
def dppo_tv(inputs: LossInputs, options: DppoTvOptions) -> tuple[Tensor, LogMetrics]:
    """Policy gradient inside a trust region of probabilities instead of ratios (binary total variation).

    ``-keep_t w_t A_t logprob_t`` with ``w_t = min(exp(logprob_t - inference_logprob_t), ratio_cap)``, held
    constant; ``keep_t`` is 0 where ``A_t > 0`` and the token's probability is above the sampler's by more
    than `epsilon_high`, or else where it is below it by more than `epsilon_low`. A rare token may change its
    ratio a lot, a frequent one may not.

    Source: Divergence PPO, arXiv 2602.04879. Own metrics: ``masked``, ``capped``.
    """
    kept = _within_total_variation(inputs, options.epsilon_low, options.epsilon_high, "dppo_tv")
    return _masked_policy_gradient(inputs, options, kept, "dppo_tv")


@loss(DppoKlOptions)
def dppo_kl(inputs: LossInputs, options: DppoKlOptions) -> tuple[Tensor, LogMetrics]:
    """The same as `dppo_tv` with the binary KL divergence of the token as its measure.

    ``keep_t`` is 0 where the token became likelier under ``A_t > 0``, or else rarer, and ``KL = q (log q -
    log p) + (1 - q) log((1 - q) / (1 - p))`` is above `epsilon_high`, or `epsilon_low`; ``q`` is the
    sampler's probability of the token, ``p`` the trainer's.

    Source: Divergence PPO, arXiv 2602.04879. Own metrics: ``masked``, ``capped``.
    """
    sampler = inputs.sampler_logprobs("dppo_kl")
    logprobs = inputs.at_trained_tokens(inputs.logprobs).detach()
    now, before = torch.exp(logprobs), torch.exp(sampler)
    others = torch.log((1.0 - before + PROBABILITY_EPSILON) / (1.0 - now + PROBABILITY_EPSILON))
    divergence = before * (sampler - logprobs) + (1.0 - before) * others
    risen = (divergence <= options.epsilon_high) | (now <= before)
    fallen = (divergence <= options.epsilon_low) | (now >= before)
    kept = torch.where(inputs.at_trained_tokens(inputs.advantages) > 0, risen, fallen)
    return _masked_policy_gradient(inputs, options, kept, "dppo_kl")


@loss(PrimeOptions)
def prime(inputs: LossInputs, options: PrimeOptions) -> tuple[Tensor, LogMetrics]:
    """Plain surrogate inside the trust region of `dppo_tv`, with a penalty that pulls towards the sampler.

    ``-keep_t r_t A_t + mismatch_penalty d_t^2`` with ``d_t = logprob_t - inference_logprob_t`` and ``r_t =
    exp(d_t)``, both with gradient; ``keep_t`` as in `dppo_tv`. The penalty is that of all trained tokens,
    masked or not. `ratio_cap` bounds ``r_t``, and its gradient with it.

    Source: prime-rl's default objective from April to August 2026 (src/prime_rl/trainer/rl/loss.py); arXiv
    2602.04879 and, for the penalty, Kimi K2.5, arXiv 2602.02276. Own metrics: ``masked``, and
    ``capped`` with a cap.
    """
    kept = _within_total_variation(inputs, options.epsilon_low, options.epsilon_high, "prime")
    return _penalized_surrogate(inputs, options, kept, "prime")


@loss(IpoOptions)
def ipo(inputs: LossInputs, options: IpoOptions) -> tuple[Tensor, LogMetrics]:
    """The same as `prime`, but a token is masked whichever way its probability moved.

    ``keep_t`` is 0 where ``|exp(logprob_t) - exp(inference_logprob_t)| > epsilon``.

    Source: prime-rl's objective of that name, its default since August 2026; from September on with an
    epsilon of 0.3, without the penalty, and with a ratio of at most 1e4. Own metrics: as `prime`.
    """
    kept = _probability_change(inputs, "ipo").abs() <= options.epsilon
    return _penalized_surrogate(inputs, options, kept, "ipo")


@torch.no_grad()
def _probability_change(inputs: LossInputs, loss_name: str) -> Tensor:
    """The trainer's probability of each token less the sampler's."""
    sampler = inputs.sampler_logprobs(loss_name)
    return torch.exp(inputs.at_trained_tokens(inputs.logprobs)) - torch.exp(sampler)


def _within_total_variation(inputs: LossInputs, low: float, high: float, loss_name: str) -> Tensor:
    change = _probability_change(inputs, loss_name)
    advantages = inputs.at_trained_tokens(inputs.advantages)
    return torch.where(advantages > 0, change <= high, change >= -low)


def _masked_policy_gradient(
    inputs: LossInputs, options: DppoTvOptions | DppoKlOptions, kept: Tensor, loss_name: str
) -> tuple[Tensor, LogMetrics]:
    ratio = torch.exp(own_log_ratio(inputs, options, loss_name).detach())
    terms = policy_gradient_terms(inputs, torch.clamp(ratio, max=options.ratio_cap) * kept)
    counts = {"capped": inputs.weighted_sum(kept & (ratio > options.ratio_cap))}
    return finish_loss(inputs, options, terms, counts, kept=kept)


def _penalized_surrogate(
    inputs: LossInputs, options: PrimeOptions | IpoOptions, kept: Tensor, loss_name: str
) -> tuple[Tensor, LogMetrics]:
    difference = sampler_log_ratio(inputs, loss_name)
    ratio = torch.exp(own_log_ratio(inputs, options, loss_name))
    counts = {}
    if options.ratio_cap is not None:
        counts["capped"] = inputs.weighted_sum(kept & (ratio > options.ratio_cap))
        # Times a constant, not clamped: a token whose ratio is cut keeps a gradient.
        ratio = ratio * torch.clamp(options.ratio_cap / ratio.detach(), max=1.0)
    advantages = inputs.at_trained_tokens(inputs.advantages)
    # A selection, because a ratio that is masked must not weigh on the sum by rounding either.
    surrogate = torch.where(kept, ratio * advantages, torch.zeros_like(advantages))
    terms = options.mismatch_penalty * difference.square() - surrogate
    return finish_loss(inputs, options, terms, counts, kept=kept)
