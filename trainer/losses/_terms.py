"""The building blocks that every loss shares: log-ratios, and the way from per-token terms to the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.losses._corrections import correction_weights
from trainer.losses._divergences import k3, log_ratio, reference_kl
from trainer.losses._inputs import LossInputs
from trainer.options import ClipOptions, CorrectionOptions, KlOptions, ObjectiveOptions

LogMetrics = dict[str, Tensor]
"""Sums over trained tokens, weighted by the mask, detached, 0-dim: add them up, divide by the count once."""


def sampler_log_ratio(inputs: LossInputs, loss_name: str) -> Tensor:
    """``log(trainer / sampler)`` per token, held to ±20; 0 where the mask is 0.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None.
    """
    sampler = inputs.sampler_logprobs(loss_name)
    return log_ratio(inputs.at_trained_tokens(inputs.logprobs), sampler)


def own_log_ratio(inputs: LossInputs, options: ObjectiveOptions, loss_name: str) -> Tensor:
    """Logarithm per token of the ratio that a loss has itself, held to ±20; 0 where the mask is 0.

    That of trainer and sampler. With a weight of the correction, which counts that one, it is the ratio to
    the policy before the update instead, as in verl and TRL. In the only update of a batch that is the policy
    itself: 0, with a gradient.

    Raises:
        MissingLogProbsError: if ``inference_logprobs`` is None.
    """
    if options.correction.weight == "none":
        return sampler_log_ratio(inputs, loss_name)
    inputs.sampler_logprobs(loss_name)  # the correction's: said here if they are missing
    logprobs = inputs.at_trained_tokens(inputs.logprobs)
    return log_ratio(logprobs, logprobs.detach())


def policy_gradient_terms(inputs: LossInputs, weight: Tensor | float = 1.0) -> Tensor:
    """``-weight A logprob`` per token; the weight has no gradient."""
    advantages = inputs.at_trained_tokens(inputs.advantages)
    return -weight * advantages * inputs.at_trained_tokens(inputs.logprobs)


def clipped_surrogate(
    inputs: LossInputs, ratio: Tensor, options: ClipOptions, *, largest: float | None = None
) -> tuple[Tensor, LogMetrics]:
    """PPO's pessimistic term ``-min(r A, clip(r) A)`` per token (Schulman et al. 2017, equation 7).

    Only two of the four regions are clipped (and have no gradient)::

                          r < 1 - epsilon_low     r > 1 + epsilon_high
        advantage > 0     free                    clipped
        advantage < 0     clipped                 free: A = -1, r = 2 gives a term of 2.0, with gradient

    Args:
        inputs: Those of the loss.
        ratio: Of each token, with gradient.
        options: The bounds.
        largest: Bounds the free ratio too. None: it does not.

    Returns:
        The terms, and how many tokens it stops: ``clipped_low``, ``clipped_high`` and ``clipped``.
    """
    advantages = inputs.at_trained_tokens(inputs.advantages)
    free = ratio if largest is None else torch.clamp(ratio, max=largest)
    bounded = torch.clamp(ratio, options.lowest, options.highest)
    low = inputs.weighted_sum((ratio < options.lowest) & (advantages < 0))
    high = inputs.weighted_sum((ratio > options.highest) & (advantages > 0))
    counts = {"clipped_low": low, "clipped_high": high, "clipped": low + high}
    return -torch.minimum(free * advantages, bounded * advantages), counts


def finish_loss(
    inputs: LossInputs,
    options: KlOptions,
    terms: Tensor,
    counts: Mapping[str, Tensor] | None = None,
    *,
    kept: Tensor | None = None,
) -> tuple[Tensor, LogMetrics]:
    """Correct the terms, add the KL penalty, reduce the sum, and measure what every loss measures.

    Args:
        inputs: Those of the loss.
        options: Its options; the correction is applied if they are `ObjectiveOptions`.
        terms: What is minimised, per token, in the inputs' shape, with gradient.
        counts: The loss's own sums for the metrics.
        kept: False where the loss itself masks a token, for the metric; None: it masks none.

    Returns:
        The loss (0-dim), and sums over trained tokens: those of `policy_metrics`, ``kl_ref`` where known,
        ``counts``, ``masked`` (tokens without gradient) if there is any mask, and ``correction_weight`` if
        there is a correction.

    Raises:
        MissingLogProbsError: if the correction needs ``inference_logprobs`` or the penalty ``ref_logprobs``,
            and they are None.
    """
    metrics = policy_metrics(inputs) | dict(counts or {})
    correction = options.correction if isinstance(options, ObjectiveOptions) else CorrectionOptions()
    if correction.is_active:
        weights = correction_weights(inputs, correction)
        terms = terms * weights
        metrics["correction_weight"] = inputs.weighted_sum(weights)
        if correction.masks:
            kept = weights > 0 if kept is None else kept & (weights > 0)
    if kept is not None:
        metrics["masked"] = inputs.weighted_sum(~kept)
    penalty, kl_metrics = reference_kl(
        inputs, options.kl_coefficient, estimator=options.kl_estimator, cap=options.kl_cap
    )
    if penalty is not None:
        terms = terms + penalty
    return inputs.reduce(terms), metrics | kl_metrics


@torch.no_grad()
def policy_metrics(inputs: LossInputs) -> LogMetrics:
    """Metrics worth watching under every loss.

    Returns:
        ``negative_logprob``; and where the sampler's log-probs are known ``ratio`` (trainer over sampler) and
        ``mismatch_kl``, the k3 estimate of KL(sampler ‖ trainer).
    """
    logprobs = inputs.at_trained_tokens(inputs.logprobs)
    metrics = {"negative_logprob": inputs.weighted_sum(-logprobs)}
    if inputs.inference_logprobs is not None:
        difference = log_ratio(logprobs, inputs.at_trained_tokens(inputs.inference_logprobs))
        metrics["ratio"] = inputs.weighted_sum(torch.exp(difference))
        metrics["mismatch_kl"] = inputs.weighted_sum(k3(difference))
    return metrics
