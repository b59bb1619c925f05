"""Attention over tiles: each tile of queries against the keys that it can see, and no other pair.

For a tile's queries Q, its keys K and values V, with S = scaling Q K^T where a query sees a key and -infinity
elsewhere (FlashAttention-2, https://arxiv.org/abs/2307.08691)::

    P = softmax(S)        O = P V
    dV = P^T dO           dS = P * (dO V^T - rowsum(dO * O))
    dQ = scaling dS K     dK = scaling dS^T Q

Here is the way in full precision; that in half precision is in `_tiled_half`. The forward pass is torch's own
kernel, tile by tile. The backward pass computes P again and writes the rest out: torch's would need its
forward pass once more before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trainer.attention._tile_rows import add_columns, as_heads, columns, rows, scores
from trainer.attention._tiled_half import HalfTiledAttention
from trainer.attention._tiles import TiledStructure

_HALF = (torch.bfloat16, torch.float16)


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, structure: TiledStructure, scaling: float | None
) -> Tensor:
    """Attend along a tree.

    Products take the autocast type where autocast is on, as torch's own attention does, else the inputs';
    scores are made, and everything is added up, in float32 (float64 for float64).

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D], K dividing H.
        value: [1, K, T, E].
        structure: The row's tiles.
        scaling: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        [1, T, H, E].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # Rotary positions leave queries and keys in float32.
        query, key, value = (each.to(torch.get_autocast_dtype(device)) for each in (query, key, value))
    kernel: Any = HalfTiledAttention if query.dtype in _HALF else _TiledAttention
    with torch.autocast(device, enabled=False):
        attended: Tensor = kernel.apply(query, key, value, structure, scaling)
    return attended


class _TiledAttention(torch.autograd.Function):
    """All tiles as one operation, so that the backward pass adds to three gradients that exist once.

    Slices under autograd would each bring a gradient of the whole row.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, structure: TiledStructure, scaling: float
    ) -> Tensor:
        attended = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for tile in structure.tiles:
            result = scaled_dot_product_attention(
                query[:, :, tile.start : tile.stop],
                columns(key, tile.keys)[None],
                columns(value, tile.keys)[None],
                attn_mask=structure.visible(tile),
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            attended[:, tile.start : tile.stop] = result.transpose(1, 2)
        ctx.save_for_backward(query, key, value, attended)
        ctx.structure, ctx.scaling = structure, scaling
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, attended = ctx.saved_tensors
        heads, groups = query.shape[1], key.shape[1]
        outer = gradients[0].transpose(1, 2)  # [1, H, T, E]
        offsets = (outer * attended.transpose(1, 2)).sum(dim=3)  # [1, H, T]: rowsum(dO * O)
        query_gradient = torch.empty_like(query)
        key_gradient, value_gradient = torch.zeros_like(key), torch.zeros_like(value)
        for tile in ctx.structure.tiles:
            weights = scores(query, key, ctx.structure, tile, ctx.scaling).softmax(dim=2)
            of_result = rows(outer, tile, groups)
            add_columns(value_gradient, tile.keys, torch.bmm(weights.transpose(1, 2), of_result))
            of_scores = torch.bmm(of_result, columns(value, tile.keys).transpose(1, 2))
            of_scores.sub_(offsets[0, :, tile.start : tile.stop].reshape(groups, -1, 1)).mul_(weights)
            of_queries = torch.bmm(of_scores, columns(key, tile.keys))
            query_gradient[0, :, tile.start : tile.stop] = as_heads(of_queries, heads)
            of_keys = torch.bmm(of_scores.transpose(1, 2), rows(query, tile, groups))
            add_columns(key_gradient, tile.keys, of_keys)
        return query_gradient.mul_(ctx.scaling), key_gradient.mul_(ctx.scaling), value_gradient, None, None
