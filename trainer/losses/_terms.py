"""The building blocks that several losses share: importance ratio, KL estimate, their metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import MissingLogProbsError
from trainer.losses._inputs import LossInputs

LogMetrics = dict[str, Tensor]
"""Sums over trained tokens, weighted by the mask, detached, 0-dim: add them up, divide by the count once."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held to ±20, a factor of 4.9e8.

float32 overflows at exp(88.7), and inf meets 0 soon after. No honest ratio comes near e^20: past it the two
models disagree about the token altogether (a wrong tokenizer, a wrong version), and it must not decide the
whole step. The gradient there is zero.
"""


def log_ratio(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """``log(p / q)`` per token, held to ±``LOG_RATIO_LIMIT`` so that its exponential is finite."""
    return torch.clamp(numerator_logprobs - denominator_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k3(log_of_ratio: Tensor) -> Tensor:
    """The k3 estimate of KL(q ‖ p) from tokens drawn from q: ``r - 1 - log r`` with ``r = p / q``.

    Unbiased, never negative, and 0 exactly where the two agree (Schulman 2020, "Approximating KL Divergence",
    http://joschu.net/blog/kl-approx.html).

    Args:
        log_of_ratio: ``log(p / q)`` per token, any shape.
    """
    # expm1, because exp(x) - 1 - x loses every digit for the small x of a nearly on-policy step.
    return torch.expm1(log_of_ratio) - log_of_ratio


def reference_kl(inputs: LossInputs, coefficient: float) -> tuple[Tensor | None, LogMetrics]:
    """KL from the policy to the reference model, per token, as a penalty and as a metric.

    ``k3`` of ``ref / policy``, differentiated as it stands, which is GRPO's term (Shao et al. 2024,
    DeepSeekMath, equation 4).

    Args:
        inputs: ``ref_logprobs`` are used where present.
        coefficient: Weight of the penalty; 0 measures only.

    Returns:
        ``coefficient * k3`` in the inputs' shape (None if the coefficient is 0), and the sum ``kl_ref`` (no
        key where there are no reference log-probs).

    Raises:
        MissingLogProbsError: if the coefficient is not 0 and there are no reference log-probs.
    """
    if inputs.ref_logprobs is None:
        if coefficient:
            raise MissingLogProbsError(
                f"kl_coefficient {coefficient} needs ref_logprobs (a reference model's log-prob per token) "
                "and got None: let the environment send them, or set loss.kl_coefficient to 0"
            )
        return None, {}
    per_token = k3(
        log_ratio(
            inputs.at_trained_tokens(inputs.ref_logprobs).detach(), inputs.at_trained_tokens(inputs.logprobs)
        )
    )
    metrics = {"kl_ref": inputs.weighted_sum(per_token).detach()}
    return (coefficient * per_token if coefficient else None), metrics


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
