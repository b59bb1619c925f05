"""The distance to a teacher of which only the likeliest candidates of each position are known."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def teacher_divergence(
    logprobs: Tensor, teacher_logprobs: Tensor, direction: Literal["forward_kl", "reverse_kl"]
) -> Tensor:
    """KL divergence between teacher and policy over the teacher's candidates, per token.

    With p the teacher's probabilities, renormalised over its K candidates of the position::

        forward_kl   sum_k p_k (log p_k - log q_k)        q the policy's probabilities, over all tokens
        reverse_kl   sum_k s_k (log s_k - log p_k)        s the policy's, renormalised over the candidates

    The forward one pulls the policy's mass onto the candidates; the reverse one says nothing of how much lies
    outside of them. Both are 0 or more. Of a single candidate the forward one is its -log q, and the reverse
    one always 0, without a gradient: it needs at least two.

    Source: Agarwal et al. 2023, On-Policy Distillation of Language Models (arXiv 2306.13649).

    Args:
        logprobs: [N, K] the policy's log-probs of the candidates, with gradient; anything elsewhere.
        teacher_logprobs: [N, K] the teacher's, minus infinity where there is no candidate.
        direction: Which of the two.

    Returns:
        [N]; 0 for a token without candidates.
    """
    known = torch.isfinite(teacher_logprobs)
    some = known.any(dim=1)
    floor = torch.finfo(logprobs.dtype).min
    target = _normalised(teacher_logprobs.to(logprobs.dtype), known, floor)
    policy = logprobs.masked_fill(~known, floor)
    if direction == "forward_kl":
        terms = target.exp() * (target - policy)
    else:
        policy = _normalised(policy, known, floor)
        terms = policy.exp() * (policy - target)
    return terms.masked_fill(~known, 0.0).sum(dim=1).masked_fill(~some, 0.0)


def _normalised(logprobs: Tensor, known: Tensor, floor: float) -> Tensor:
    return logprobs.masked_fill(~known, floor).log_softmax(dim=1)
