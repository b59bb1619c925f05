"""Advantage-weighted supervised fine-tuning: the default loss."""

from __future__ import annotations

from torch import Tensor

from trainer.losses._inputs import LossInputs
from trainer.losses._options import check_options
from trainer.losses._terms import LogMetrics, policy_metrics, reference_kl


def weighted_sft(inputs: LossInputs, *, kl_coefficient: float = 0.0) -> tuple[Tensor, LogMetrics]:
    """Cross-entropy of each token, weighted by its advantage.

    ``loss = sum_t mask_t * (-logprob_t * advantage_t [+ kl_coefficient * k3_t]) / denominator``

    With advantages of 1 this is supervised fine-tuning; with on-policy samples its gradient is REINFORCE's.
    It corrects for no difference between sampler and trainer. Source: the Atropos integration for VERL,
    "token-level advantage-weighted SFT"; :func:`trainer.compute_advantage_weighted_sft_loss` is the same loss
    with the model's forward pass in front.

    Args:
        inputs: Token-aligned; ``inference_logprobs`` are only measured.
        kl_coefficient: Weight of the k3 penalty towards ``ref_logprobs``; 0 for none.

    Returns:
        The loss (0-dim), and sums over trained tokens: ``negative_logprob``, and where known ``ratio``,
        ``mismatch_kl``, ``kl_ref``.

    Raises:
        MissingLogProbsError: if a KL penalty is asked for and ``ref_logprobs`` is None.
        ConfigurationError: if an option is out of range.
    """
    check_options(kl_coefficient=kl_coefficient)
    logprobs = inputs.at_trained_tokens(inputs.logprobs)
    per_token = -logprobs * inputs.at_trained_tokens(inputs.advantages)
    penalty, kl_metrics = reference_kl(inputs, kl_coefficient)
    if penalty is not None:
        per_token = per_token + penalty
    return inputs.reduce(per_token), policy_metrics(inputs) | kl_metrics
