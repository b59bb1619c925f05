"""What a head says of the entries it is asked about, and how that is read off plain logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """N targets, predicted from U rows. Float32, or float64 where the model computes in it."""

    logprobs: Tensor
    """[N], in nats, with gradient."""
    entropy: Tensor
    """[U], in nats: of each row's distribution; no gradient."""
    top_ids: Tensor | None
    """[U, K] int64: each row's likeliest tokens, likeliest first. None if not asked for."""
    top_logprobs: Tensor | None
    """[U, K], in nats, of `top_ids`; no gradient."""


def score_logits(logits: Tensor, rows: Tensor, targets: Tensor, *, top_k: int = 0) -> HeadScores:
    """Score targets under logits by ordinary autograd operations.

    Args:
        logits: [U, V], already scaled and divided by the temperature.
        rows: [N] int64, in [0, U): which row predicts a target.
        targets: [N] int64, in [0, V).
        top_k: How many of each row's likeliest tokens to name.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    normalizer = logits.logsumexp(dim=-1)  # [U]
    logprobs = logits[rows, targets] - normalizer[rows]
    with torch.no_grad():
        entropy = normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        top = logits.topk(min(top_k, logits.shape[1])) if top_k else None
    return HeadScores(
        logprobs=logprobs,
        entropy=entropy,
        top_ids=None if top is None else top.indices,
        top_logprobs=None if top is None else top.values - normalizer.detach()[:, None],
    )
