"""Attention over tiles: each tile of queries against the keys that it can see, and no other pair.

For a tile's queries Q, its keys K and values V, with S = scaling Q K^T where a query sees a key and -infinity
elsewhere (FlashAttention-2, https://arxiv.org/abs/2307.08691)::

    P = softmax(S)        O = P V
    dV = P^T dO           dS = P * (dO V^T - rowsum(dO * O))
    dQ = scaling dS K     dK = scaling dS^T Q

The forward pass is torch's own kernel, tile by tile. The backward pass computes P again and writes the rest
out: torch's would need its forward pass once more before it, and on a CPU takes twice as long in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trainer.attention._tiles import Range, Tile, TiledStructure


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
    with torch.autocast(device, enabled=False):
        attended: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, structure, scaling
        )
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
                _columns(key, tile.keys)[None],
                _columns(value, tile.keys)[None],
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
        precision = _accumulation_dtype(query.dtype)
        # [1, H, T]: rowsum(dO * O)
        offsets = (outer.to(precision) * attended.transpose(1, 2).to(precision)).sum(dim=3)
        query_gradient = torch.empty_like(query)
        # A shared prefix gathers from many tiles: not in half precision, as one kernel would not either.
        key_gradient = torch.zeros_like(key, dtype=precision)
        value_gradient = torch.zeros_like(value, dtype=precision)
        for tile in ctx.structure.tiles:
            queries, keys = _queries(query, tile, groups), _columns(key, tile.keys)
            values, of_result = _columns(value, tile.keys), _queries(outer, tile, groups)
            weights = _scores(queries, keys, ctx.structure, tile, ctx.scaling).softmax(dim=2)
            _add_columns(
                value_gradient, tile.keys, torch.bmm(weights.to(value.dtype).transpose(1, 2), of_result)
            )
            slope = torch.bmm(of_result, values.transpose(1, 2)).to(precision)
            slope.sub_(offsets[0, :, tile.start : tile.stop].reshape(groups, -1, 1)).mul_(weights)
            of_scores = slope.mul_(ctx.scaling).to(query.dtype)
            query_gradient[0, :, tile.start : tile.stop] = _as_heads(torch.bmm(of_scores, keys), heads)
            _add_columns(key_gradient, tile.keys, torch.bmm(of_scores.transpose(1, 2), queries))
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None


def _scores(queries: Tensor, keys: Tensor, structure: TiledStructure, tile: Tile, scaling: float) -> Tensor:
    """[K, G * L, S], -infinity where a query does not see a key."""
    precision = _accumulation_dtype(queries.dtype)
    scores = torch.bmm(queries.to(precision), keys.to(precision).transpose(1, 2)).mul_(scaling)
    hidden = ~structure.visible(tile)  # [L, S]
    scores.view(len(keys), -1, *hidden.shape).masked_fill_(hidden, -torch.inf)
    return scores


def _queries(values: Tensor, tile: Tile, groups: int) -> Tensor:
    """[1, H, T, D] -> [K, G * L, D]: the rows that share a key head below one another."""
    return values[0, :, tile.start : tile.stop].reshape(groups, -1, values.shape[3])


def _as_heads(rows: Tensor, heads: int) -> Tensor:
    """[K, G * L, D] -> [H, L, D]."""
    return rows.reshape(heads, -1, rows.shape[2])


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _columns(values: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """[1, K, T, D] -> the columns in `ranges`, [K, S, D]; a view where they are contiguous."""
    if len(ranges) == 1:
        return values[0, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([values[0, :, start:stop] for start, stop in ranges], dim=1)


def _add_columns(values: Tensor, ranges: tuple[Range, ...], added: Tensor) -> None:
    first = 0
    for start, stop in ranges:
        values[0, :, start:stop] += added[:, first : first + stop - start]
        first += stop - start
