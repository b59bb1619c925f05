"""Choosing the next token of every row of a batch at once, and its log-prob.

One uniform number per row picks the token by inverting the cumulative distribution, so that no row's outcome
depends on another row. Shapes: `N` rows, `V` vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import NamedTuple

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from local_stack.inference.records import TopLogProbs
from schemas.inference import LOWEST_LOGPROB, CompletionRequest


class Sampled(NamedTuple):
    """The next token of one row."""

    token_id: int
    logprob: float
    """Under the model itself, whatever the temperature. NaN where the model's output was not finite."""
    top: TopLogProbs
    """Empty for a row that did not ask."""


def sample(
    logits: torch.Tensor, parameters: ListLike[CompletionRequest], numbers: ListLike[float]
) -> list[Sampled]:
    """Sample one token per row.

    Args:
        logits: [N, V] float32; left as it is.
        parameters: One per row.
        numbers: Uniform in [0, 1), one per row.
    """
    logprobs = logits.log_softmax(dim=-1)
    temperatures = [1.0 if is_greedy(entry) else entry.temperature for entry in parameters]
    shaped = logprobs / torch.tensor(temperatures)[:, None]
    for row, entry in enumerate(parameters):
        shaped[row] = _truncated(shaped[row], entry)
    cumulative = shaped.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [N, V]
    total = cumulative[:, -1:]
    target = torch.tensor(numbers, dtype=torch.float64)[:, None] * total
    # Below the total even after rounding: then the token has a probability.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)[:, 0]
    greedy = torch.tensor([is_greedy(entry) for entry in parameters])
    chosen = torch.where(greedy, shaped.argmax(dim=-1), drawn)
    logprobs = logprobs.clamp(min=LOWEST_LOGPROB)
    own = logprobs.gather(1, chosen[:, None])[:, 0]
    top = [_likeliest(row, entry.logprobs or 0) for row, entry in zip(logprobs, parameters, strict=True)]
    return [Sampled(*each) for each in zip(chosen.tolist(), own.tolist(), top, strict=True)]


def is_greedy(parameters: CompletionRequest) -> bool:
    """Tell whether the likeliest token is taken; the threshold is vLLM's."""
    return parameters.temperature < 1e-5


def _truncated(logits: torch.Tensor, parameters: CompletionRequest) -> torch.Tensor:
    """Keep the `top_k` likeliest, of these the mass `top_p`, of these what reaches `min_p`."""
    # transformers' functions want the tokens before, and ignore them.
    nothing, batch = torch.empty(0, dtype=torch.int64), logits[None]
    if parameters.top_k > 0:
        batch = TopKLogitsWarper(parameters.top_k)(nothing, batch)
    if parameters.top_p < 1.0:
        batch = TopPLogitsWarper(parameters.top_p)(nothing, batch)
    if parameters.min_p:
        batch = MinPLogitsWarper(parameters.min_p)(nothing, batch)
    return batch[0]


def _likeliest(logprobs: torch.Tensor, count: int) -> TopLogProbs:
    values, ids = logprobs.topk(count)
    return list(zip(ids.tolist(), values.tolist(), strict=True))
