"""Surrogate objectives that bound the importance ratio of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._divergences import log_ratio
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import LogMetrics, clipped_surrogate, finish_loss, own_log_ratio
from trainer.options import DecoupledPpoOptions, PpoClipOptions, SapoOptions


@loss(PpoClipOptions)
def ppo_clip(inputs: LossInputs, options: PpoClipOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's pessimistic bound, per token.

    ``-min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)`` with ``r_t = exp(logprob_t -
    inference_logprob_t)``; with `two_sided` the first ``r_t`` is ``min(r_t, two_sided)``, with `dual_clip`
    and ``A_t < 0`` the term is at most ``-dual_clip A_t``.

    Sources: Schulman et al. 2017, equation 7; two epsilons: DAPO (Yu et al. 2025), "clip-higher"; dual clip:
    Ye et al. 2019, arXiv 1912.09729; two-sided: INTELLECT-2, arXiv 2505.07291. Own metrics: ``clipped_low``,
    ``clipped_high``, ``clipped`` (both); ``clipped_dual``, the tokens of negative advantage that `dual_clip`
    or `two_sided` stops, if either is set.
    """
    ratio = torch.exp(own_log_ratio(inputs, options, "ppo_clip"))
    terms, counts = clipped_surrogate(inputs, ratio, options, largest=options.two_sided)
    negative = inputs.at_trained_tokens(inputs.advantages) < 0
    if options.dual_clip is not None:
        most = -options.dual_clip * inputs.at_trained_tokens(inputs.advantages)
        terms = torch.where(negative, torch.minimum(terms, most), terms)
    limits = [limit for limit in (options.dual_clip, options.two_sided) if limit is not None]
    if limits:
        counts["clipped_dual"] = inputs.weighted_sum((ratio > min(limits)) & negative)
    return finish_loss(inputs, options, terms, counts)


@loss(DecoupledPpoOptions)
def decoupled_ppo(inputs: LossInputs, options: DecoupledPpoOptions) -> tuple[Tensor, LogMetrics]:
    """PPO's clip around a proximal policy, weighted by that policy's ratio to the sampler's.

    ``-w_t min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)`` with ``r_t = exp(logprob_t -
    proximal_logprob_t)`` and ``w_t = min(exp(proximal_logprob_t - inference_logprob_t), ratio_cap)``, held
    constant.

    The proximal policy is that of the weights before the update; in the only update of a batch it is the
    policy itself, so ``r_t`` is 1 with a gradient: staleness never clips, it only weighs. `proximal`
    interpolated takes the policy of one version before instead, as estimated from samples that are `a`
    versions old: ``proximal_logprob = inference_logprob + (a - 1) / a (logprob - inference_logprob)``. At an
    age of 1 or 0, or where ``staleness`` is None, that is the sampler, and the loss `ppo_clip`'s.

    Source: Hilton et al. 2021, "Batch size-invariance for policy optimization", arXiv 2110.00641; AReaL,
    arXiv 2505.24298, and its "proximal log-probability approximation" (prox_logp_method loglinear). Own
    metrics: ``clipped_low``, ``clipped_high``, ``clipped``.
    """
    logprobs = inputs.at_trained_tokens(inputs.logprobs)
    sampler = inputs.sampler_logprobs("decoupled_ppo")
    if options.correction.weight != "none":  # it weighs in the place of this loss's own
        sampler = logprobs.detach()
    proximal = logprobs.detach()
    if options.proximal == "interpolated":
        age = max(1, inputs.staleness or 1)
        proximal = torch.lerp(sampler, proximal, (age - 1) / age)
    weight = torch.exp(log_ratio(proximal, sampler))
    if options.ratio_cap is not None:
        weight = torch.clamp(weight, max=options.ratio_cap)
    terms, counts = clipped_surrogate(inputs, torch.exp(log_ratio(logprobs, proximal)), options)
    return finish_loss(inputs, options, weight * terms, counts)


@loss(SapoOptions)
def sapo(inputs: LossInputs, options: SapoOptions) -> tuple[Tensor, LogMetrics]:
    """Surrogate whose gradient fades smoothly as the ratio leaves 1, where PPO's clip cuts it off.

    ``-4 / tau * sigmoid(tau (r_t - 1)) A_t`` with ``r_t = exp(logprob_t - inference_logprob_t)`` and ``tau``
    one of two temperatures, by the sign of the advantage. On policy the gradient is that of the plain
    surrogate. The paper averages over each sequence, then over sequences: `loss.reduction: sequence`.

    Source: Soft Adaptive Policy Optimization, arXiv 2511.20347. Own metric: ``gate``, what is left of each
    gradient, 1 on policy.
    """
    ratio = torch.exp(own_log_ratio(inputs, options, "sapo"))
    advantages = inputs.at_trained_tokens(inputs.advantages)
    positive = torch.full_like(ratio, options.temperature_positive)
    temperature = torch.where(advantages > 0, positive, options.temperature_negative)
    soft = torch.sigmoid(temperature * (ratio - 1.0))
    counts = {"gate": inputs.weighted_sum(4.0 * soft * (1.0 - soft)).detach()}
    return finish_loss(inputs, options, -4.0 / temperature * soft * advantages, counts)
