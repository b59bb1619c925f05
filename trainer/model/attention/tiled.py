"""Attention over tiles: each tile of queries against the keys that it can see, and no other pair.

For a tile's queries Q, its keys K and values V, with S = scaling Q K^T where a query sees a key and -infinity
elsewhere (FlashAttention-2, https://arxiv.org/abs/2307.08691)::

    P = softmax(S)        O = P V
    dV = P^T dO           dS = P * (dO V^T - rowsum(dO * O))
    dQ = scaling dS K     dK = scaling dS^T Q

`_TiledAttention` is the way in full precision, `_HalfTiledAttention` that in half precision. The forward pass
is torch's own kernel, tile by tile. The backward pass computes P again and writes the rest out: torch's would
need its forward pass once more before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trainer.model.attention.tile_plan import Range, Tile, TiledStructure

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
    kernel: Any = _HalfTiledAttention if query.dtype in _HALF else _TiledAttention
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
            grad_result = rows(outer, tile, groups)
            add_columns(value_gradient, tile.keys, torch.bmm(weights.transpose(1, 2), grad_result))
            grad_scores = torch.bmm(grad_result, columns(value, tile.keys).transpose(1, 2))
            grad_scores.sub_(offsets[0, :, tile.start : tile.stop].reshape(groups, -1, 1)).mul_(weights)
            grad_queries = torch.bmm(grad_scores, columns(key, tile.keys))
            query_gradient[0, :, tile.start : tile.stop] = as_heads(grad_queries, heads)
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), rows(query, tile, groups))
            add_columns(key_gradient, tile.keys, grad_keys)
        return query_gradient.mul_(ctx.scaling), key_gradient.mul_(ctx.scaling), value_gradient, None, None


def rows(values: Tensor, tile: Tile, groups: int) -> Tensor:
    """[1, H, T, D] -> the tile's queries, [K, G * L, D]: those that share a key head below one another."""
    return values[0, :, tile.start : tile.stop].reshape(groups, -1, values.shape[3])


def scores(query: Tensor, key: Tensor, structure: TiledStructure, tile: Tile, scaling: float) -> Tensor:
    """S of a tile, [K, G * L, S], -infinity where a query does not see a key.

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D].
        structure: The row's tiles.
        tile: One of them.
        scaling: Factor of the products.
    """
    result = torch.bmm(rows(query, tile, key.shape[1]), columns(key, tile.keys).transpose(1, 2)).mul_(scaling)
    structure.hide(result, tile)
    return result


def as_heads(result: Tensor, heads: int) -> Tensor:
    """[K, G * L, D] -> [H, L, D]."""
    return result.reshape(heads, -1, result.shape[2])


def columns(values: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """[1, K, T, D] -> the columns in `ranges`, [K, S, D]; a view where they are contiguous."""
    if len(ranges) == 1:
        return values[0, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([values[0, :, start:stop] for start, stop in ranges], dim=1)


def add_columns(values: Tensor, ranges: tuple[Range, ...], added: Tensor) -> None:
    """Add [K, S, D] to the columns in `ranges` of [1, K, T, D], in place."""
    first = 0
    for start, stop in ranges:
        values[0, :, start:stop] += added[:, first : first + stop - start]
        first += stop - start


class _HalfTiledAttention(torch.autograd.Function):
    """All tiles as one operation, in half precision; see the module."""

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
            grad_result = rows(outer, tile, groups)
            add_columns(value_gradient, tile.keys, torch.bmm(weights.transpose(1, 2), grad_result))
            grad_weights = torch.bmm(grad_result, columns(value, tile.keys).transpose(1, 2))
            # What is rowsum(dO * O) elsewhere is here the sum over P * dP, of the P that is at hand.
            grad_scores = torch._softmax_backward_data(grad_weights, weights, 2, weights.dtype)
            grad_queries = torch.bmm(grad_scores, columns(key, tile.keys)).mul_(ctx.scaling)
            query_gradient[0, :, tile.start : tile.stop] = as_heads(grad_queries, heads)
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), rows(query, tile, groups))
            add_columns(key_gradient, tile.keys, grad_keys)
        grad_key = key_gradient.mul_(ctx.scaling).to(key.dtype)
        return query_gradient, grad_key, value_gradient.to(value.dtype), None, None


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
