"""Choosing the next token of every row of a batch at once, and its log-prob.

One uniform number per row picks the token by inverting the cumulative distribution, so that no row's outcome
depends on another row. Shapes: `N` rows, `V` vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from local_stack.inference.records import SamplingParameters, TopLogProbs


@dataclass(frozen=True)
class Sampled:
    """The outcome for `N` rows."""

    token_ids: list[int]
    logprobs: list[float]
    """Under the model itself, whatever the temperature. NaN where the model's output was not finite."""
    top: list[TopLogProbs]
    """Empty lists for rows that did not ask."""


def sample(
    logits: torch.Tensor, parameters: ListLike[SamplingParameters], numbers: ListLike[float]
) -> Sampled:
    """Sample one token per row.

    Args:
        logits: [N, V] float32; left as it is.
        parameters: One per row.
        numbers: Uniform in [0, 1), one per row.
    """
    logprobs = logits.log_softmax(dim=-1)
    processed = _processed(logprobs, parameters)
    cumulative = processed.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [N, V]
    total = cumulative[:, -1:]
    target = torch.tensor(numbers, dtype=torch.float64)[:, None] * total
    # Below the total even after rounding: then the token has a probability.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)[:, 0]
    greedy = torch.tensor([entry.greedy for entry in parameters])
    if greedy.any():
        chosen[greedy] = processed[greedy].argmax(dim=-1)
    own = logprobs.gather(1, chosen[:, None])[:, 0]
    return Sampled(chosen.tolist(), own.tolist(), _top(logprobs, parameters))


def _processed(logits: torch.Tensor, parameters: ListLike[SamplingParameters]) -> torch.Tensor:
    """Logits of the distribution to sample from."""
    temperatures = [1.0 if entry.greedy else entry.temperature for entry in parameters]
    result = logits / torch.tensor(temperatures)[:, None]
    cuts = [(0, 1.0, 0.0) if p.greedy else (p.top_k, p.top_p, p.min_p) for p in parameters]
    for cut in set(cuts) - {(0, 1.0, 0.0)}:
        rows = [row for row, other in enumerate(cuts) if other == cut]
        result[rows] = _truncated(result[rows], *cut)
    return result


def _truncated(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Keep the `top_k` likeliest, of these the mass `top_p`, of these what reaches `min_p`."""
    # transformers' functions want the tokens before, and ignore them.
    nothing = torch.empty(0, dtype=torch.int64)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(nothing, logits)
    if top_p < 1.0:
        logits = TopPLogitsWarper(top_p)(nothing, logits)
    if min_p:
        logits = MinPLogitsWarper(min_p)(nothing, logits)
    return logits


def _top(logprobs: torch.Tensor, parameters: ListLike[SamplingParameters]) -> list[TopLogProbs]:
    result: list[TopLogProbs] = []
    for row, entry in zip(logprobs, parameters, strict=True):
        values, ids = row.topk(entry.logprobs)
        result.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
    return result
