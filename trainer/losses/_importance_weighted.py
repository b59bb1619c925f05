"""Policy gradients: cross-entropy times advantage, times an importance weight that is held constant."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.extensions import loss
from trainer.losses._inputs import LossInputs
from trainer.losses._terms import LogMetrics, finish_loss, own_log_ratio, policy_gradient_terms
from trainer.options import CispoOptions, ObjectiveOptions, PolicyGradientOptions


@loss(ObjectiveOptions)
def weighted_sft(inputs: LossInputs, options: ObjectiveOptions) -> tuple[Tensor, LogMetrics]:
    """Weigh the cross-entropy of each token by its advantage: ``-A_t logprob_t``.

    With advantages of 1 this is supervised fine-tuning; with on-policy samples its gradient is REINFORCE's.
    It corrects for no difference between sampler and trainer unless `correction` says so, and needs
    ``inference_logprobs`` only then. Source: the Atropos integration for VERL, "token-level
    advantage-weighted SFT"; :func:`trainer.compute_advantage_weighted_sft_loss` is the same loss with the
    model's forward pass in front.
    """
    return finish_loss(inputs, options, policy_gradient_terms(inputs))


@loss(PolicyGradientOptions)
def policy_gradient(inputs: LossInputs, options: PolicyGradientOptions) -> tuple[Tensor, LogMetrics]:
    """REINFORCE, corrected per token for what the sampler's policy was (truncated importance sampling).

    ``-w_t A_t logprob_t`` with ``w_t = min(exp(logprob_t - inference_logprob_t), ratio_cap)``, held constant.

    The cap bounds the variance that a token the sampler found unlikely would bring (Ionides 2008, "Truncated
    Importance Sampling"; for the mismatch between inference engine and trainer: Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training"). Own metric: ``capped``, tokens whose
    weight was cut.
    """
    ratio = torch.exp(own_log_ratio(inputs, options, "policy_gradient").detach())
    terms = policy_gradient_terms(inputs, torch.clamp(ratio, max=options.ratio_cap))
    return finish_loss(inputs, options, terms, {"capped": inputs.weighted_sum(ratio > options.ratio_cap)})


@loss(CispoOptions)
def cispo(inputs: LossInputs, options: CispoOptions) -> tuple[Tensor, LogMetrics]:
    """Clip the importance weight on both sides and hold it constant: no token loses its gradient.

    ``-w_t A_t logprob_t`` with ``w_t = clip(exp(logprob_t - inference_logprob_t), 1 - epsilon_low,
    1 + epsilon_high)``.

    Source: MiniMax-M1, arXiv 2506.13585, which leaves the lower bound out; ScaleRL, arXiv 2510.13786. Own
    metric: ``clipped``, tokens whose weight was changed.
    """
    ratio = torch.exp(own_log_ratio(inputs, options, "cispo").detach())
    weight = torch.clamp(ratio, 1.0 - options.epsilon_low, 1.0 + options.epsilon_high)
    counts = {"clipped": inputs.weighted_sum(weight != ratio)}
    return finish_loss(inputs, options, policy_gradient_terms(inputs, weight), counts)
