"""Attention over tiles in half precision, where no kernel of torch's is fast at it: on CPUs.

Products of bfloat16 are two to three times as fast as those of float32, and what they yield is bfloat16.
That is too coarse for scores: one of 20 would be off by 0.06, and its weight by 6%. So the forward pass makes
scores in float32, and keeps the largest of each query, M. The backward pass takes them from a product that
yields S - M at once::

    S - M = scaling [Q, -M / scaling] [K, 1]^T        P = softmax(S - M)

The larger a weight, the nearer its S - M is to 0, and the less it loses by rounding. M is added in two terms,
because one would be as coarse. The gradients are nearer to the exact ones than those of torch's own kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.attention._tile_rows import add_columns, as_heads, columns, rows, scores
from trainer.attention._tiles import TiledStructure


class HalfTiledAttention(torch.autograd.Function):
    """All tiles as one operation; see `trainer.attention._tiled`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, structure: TiledStructure, scaling: float
    ) -> Tensor:
        heads = query.shape[1]
        attended = query.new_empty(1, query.shape[2], heads, value.shape[3])
        largest = torch.empty(*query.shape[:3], 1, dtype=torch.float32, device=query.device)
        exact_query, exact_key = query.float(), key.float()
        for tile in structure.tiles:
            exact = scores(exact_query, exact_key, structure, tile, scaling)
            largest[0, :, tile.start : tile.stop] = as_heads(exact.amax(dim=2, keepdim=True), heads)
            weights = exact.softmax(dim=2).to(value.dtype)
            result = torch.bmm(weights, columns(value, tile.keys))
            attended[0, tile.start : tile.stop] = as_heads(result, heads).transpose(0, 1)
        ctx.save_for_backward(query, key, value, largest)
        ctx.structure, ctx.scaling = structure, scaling
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, largest = ctx.saved_tensors
        heads, groups = query.shape[1], key.shape[1]
        outer = gradients[0].transpose(1, 2)  # [1, H, T, E]
        long_query, long_key = _with_added(query, key, largest / -ctx.scaling)
        query_gradient = torch.empty_like(query)
        # A shared prefix gathers from many tiles: not in half precision, as one kernel would not either.
        key_gradient = torch.zeros_like(key, dtype=torch.float32)
        value_gradient = torch.zeros_like(value, dtype=torch.float32)
        for tile in ctx.structure.tiles:
            weights = scores(long_query, long_key, ctx.structure, tile, ctx.scaling).softmax(dim=2)
            of_result = rows(outer, tile, groups)
            add_columns(value_gradient, tile.keys, torch.bmm(weights.transpose(1, 2), of_result))
            of_weights = torch.bmm(of_result, columns(value, tile.keys).transpose(1, 2))
            # What is rowsum(dO * O) elsewhere is here the sum over P * dP, of the P that is at hand.
            of_scores = torch._softmax_backward_data(of_weights, weights, 2, weights.dtype)
            of_queries = torch.bmm(of_scores, columns(key, tile.keys)).mul_(ctx.scaling)
            query_gradient[0, :, tile.start : tile.stop] = as_heads(of_queries, heads)
            of_keys = torch.bmm(of_scores.transpose(1, 2), rows(query, tile, groups))
            add_columns(key_gradient, tile.keys, of_keys)
        of_key = key_gradient.mul_(ctx.scaling).to(key.dtype)
        return query_gradient, of_key, value_gradient.to(value.dtype), None, None


def _with_added(query: Tensor, key: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Make queries and keys two columns longer, so that their products are larger by `added`.

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D].
        added: [1, H, T, 1] float32, for every product of a query.

    Returns:
        [1, H, T, D + 2] and [1, K, T, D + 2].
    """
    coarse = added.to(query.dtype)
    rest = (added - coarse).to(query.dtype)
    ones = torch.ones_like(key[..., :1])
    return torch.cat([query, coarse, rest], dim=3), torch.cat([key, ones, ones], dim=3)
