"""Estimates of the KL divergence to a reference model, from the tokens that were sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import MissingLogProbsError
from trainer.losses._inputs import LossInputs
from trainer.options import KlEstimator

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


def reference_kl(
    inputs: LossInputs,
    coefficient: float,
    *,
    estimator: KlEstimator = "k3",
    cap: float | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """KL from the policy to the reference model, per token, as a penalty and as a metric.

    Args:
        inputs: ``ref_logprobs`` are used where present.
        coefficient: Weight of the penalty; 0 measures only.
        estimator: The penalty's, see `KlOptions`; differentiated as it stands. The metric is always k3.
        cap: Largest penalty of a token before it is weighted; None: no bound.

    Returns:
        ``coefficient * KL`` in the inputs' shape (None if the coefficient is 0), and the sum ``kl_ref`` (no
        key where there are no reference log-probs).

    Raises:
        MissingLogProbsError: if the coefficient is not 0 and there are no reference log-probs, or for
            k3_unbiased none of the sampler.
    """
    if inputs.ref_logprobs is None:
        if coefficient:
            raise MissingLogProbsError(
                f"kl_coefficient {coefficient} needs ref_logprobs (a reference model's log-prob per token) "
                "and got None: let the environment send them, name a model with loss.reference, or set "
                "loss.kl_coefficient to 0"
            )
        return None, {}
    logprobs = inputs.at_trained_tokens(inputs.logprobs)
    log_of_ratio = log_ratio(inputs.at_trained_tokens(inputs.ref_logprobs).detach(), logprobs)
    estimate = k3(log_of_ratio)
    metrics = {"kl_ref": inputs.weighted_sum(estimate).detach()}
    if not coefficient:
        return None, metrics
    if estimator == "k1":
        estimate = -log_of_ratio
    elif estimator == "k2":
        estimate = 0.5 * log_of_ratio.square()
    if cap is not None:
        estimate = torch.clamp(estimate, max=cap)
    if estimator == "k3_gradient_k2":
        half_square = 0.5 * log_of_ratio.square()
        estimate = estimate.detach() + half_square - half_square.detach()
    elif estimator == "k3_unbiased":
        sampler = inputs.sampler_logprobs("kl_estimator k3_unbiased")
        estimate = estimate * torch.exp(log_ratio(logprobs, sampler))
    return coefficient * estimate, metrics
