"""Choosing the next token of every row of a batch at once, and its log-prob.

One uniform number per row picks the token by inverting the cumulative distribution, in two levels (blocks,
then inside the block), so that one pass over the vocabulary is enough and no row waits for another.
Shapes: `N` rows, `V` vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from local_stack.inference.sequences import SamplingParameters, TopLogProbs
from local_stack.inference.settings import LogProbsMode

_BLOCK = 256


@dataclass(frozen=True)
class Sampled:
    """The outcome for `N` rows."""

    token_ids: list[int]
    logprobs: list[float]
    """NaN where the model's output was not finite."""
    top: list[TopLogProbs]
    """Empty lists for rows that did not ask."""


def sample(
    logits: torch.Tensor,
    parameters: ListLike[SamplingParameters],
    numbers: NDArray[np.float64],
    forbidden: ListLike[frozenset[int]],
    mode: LogProbsMode,
) -> Sampled:
    """Sample one token per row.

    Args:
        logits: [N, V] float32; left as it is.
        parameters: One per row.
        numbers: [N] uniform in [0, 1), one per row.
        forbidden: One per row: token ids that must not come (minimum length not reached yet).
        mode: Which distribution the returned log-probs belong to.
    """
    processed = _processed(logits, parameters, forbidden)
    normalizer = processed.logsumexp(dim=-1, keepdim=True)  # [N, 1]
    chosen = _invert(processed.sub(normalizer).exp_(), torch.from_numpy(numbers))
    greedy = torch.tensor([entry.greedy for entry in parameters])
    if greedy.any():
        chosen[greedy] = processed[greedy].argmax(dim=-1)
    if mode == "raw_logprobs" and processed is not logits:
        scored, normalizer = logits, logits.logsumexp(dim=-1, keepdim=True)
    else:
        scored = processed
    logprobs = scored.gather(1, chosen[:, None]).sub(normalizer)[:, 0]  # [N]
    return Sampled(chosen.tolist(), logprobs.tolist(), _top(scored, normalizer, parameters))


def _processed(
    logits: torch.Tensor, parameters: ListLike[SamplingParameters], forbidden: ListLike[frozenset[int]]
) -> torch.Tensor:
    """Logits of the distribution to sample from; the very same tensor if nothing has to change."""
    temperatures = [1.0 if entry.greedy else entry.temperature for entry in parameters]
    truncating = [row for row, entry in enumerate(parameters) if entry.truncates]
    if not truncating and not any(forbidden) and all(value == 1.0 for value in temperatures):
        return logits
    result = logits.clone()
    for row, ids in enumerate(forbidden):
        if ids:
            result[row, list(ids)] = -torch.inf
    result.div_(torch.tensor(temperatures)[:, None])
    if truncating:
        result[truncating] = _truncated(result[truncating], [parameters[row] for row in truncating])
    return result


def _truncated(logits: torch.Tensor, parameters: ListLike[SamplingParameters]) -> torch.Tensor:
    """Keep the `top_k` likeliest, of these the mass `top_p`, of these what reaches `min_p`. [N, V]."""
    vocabulary = logits.shape[1]
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    keep_count = torch.tensor([entry.top_k or vocabulary for entry in parameters])[:, None]
    dropped = torch.arange(vocabulary)[None, :] >= keep_count
    probabilities = descending.masked_fill(dropped, -torch.inf).softmax(dim=-1, dtype=torch.float64)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    dropped |= (
        mass_before >= torch.tensor([entry.top_p for entry in parameters], dtype=torch.float64)[:, None]
    )
    floor = torch.tensor([entry.min_p for entry in parameters], dtype=torch.float64)[:, None]
    dropped |= probabilities < floor * probabilities[:, :1]
    dropped[:, 0] = False  # the likeliest token always stays
    return torch.full_like(logits, -torch.inf).scatter_(1, order, descending.masked_fill(dropped, -torch.inf))


def _invert(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """First token whose cumulative probability exceeds the row's number. [N, V], [N] -> [N] int64."""
    rows, vocabulary = probabilities.shape
    if vocabulary % _BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, _BLOCK - vocabulary % _BLOCK))
    blocks = probabilities.view(rows, -1, _BLOCK)
    cumulative = blocks.sum(dim=-1).to(torch.float64).cumsum(dim=-1)  # [N, blocks]
    target = numbers * cumulative[:, -1]
    block = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=blocks.shape[1] - 1)
    every = torch.arange(rows)
    before = torch.where(block > 0, cumulative[every, (block - 1).clamp(min=0)], 0.0)
    inside = blocks[every, block].to(torch.float64)  # [N, block size]
    position = torch.searchsorted(inside.cumsum(dim=-1), (target - before)[:, None], right=True)[:, 0]
    # The block's sum was rounded in float32: a target at its very end falls on the last possible token.
    last_possible = (inside > 0).to(torch.int64).mul(torch.arange(_BLOCK)).amax(dim=-1)
    return (block * _BLOCK + torch.minimum(position, last_possible)).clamp_(max=vocabulary - 1)


def _top(
    scored: torch.Tensor, normalizer: torch.Tensor, parameters: ListLike[SamplingParameters]
) -> list[TopLogProbs]:
    result: list[TopLogProbs] = [[] for _ in parameters]
    asking = [row for row, entry in enumerate(parameters) if entry.top_logprobs > 0]
    if asking:
        most = max(parameters[row].top_logprobs for row in asking)
        values, ids = scored[asking].topk(most, dim=-1)
        values -= normalizer[asking]
        for row, row_ids, row_values in zip(asking, ids.tolist(), values.tolist(), strict=True):
            pairs = list(zip(row_ids, row_values, strict=True))
            result[row] = pairs[: parameters[row].top_logprobs]
    return result
