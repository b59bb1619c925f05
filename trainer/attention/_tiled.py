"""Attention over tiles: each tile of queries against the keys that it can see, by torch's own kernel."""

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

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D], K dividing H.
        value: [1, K, T, E].
        structure: The row's tiles.
        scaling: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        [1, T, H, E].
    """
    attended: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, structure, scaling
    )
    return attended


class _TiledAttention(torch.autograd.Function):
    """All tiles as one operation, so that the backward pass adds to three gradients that exist once.

    Slices under autograd would each bring a gradient of the whole row. Tiles are computed again in the
    backward pass, so that nothing but the inputs is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        structure: TiledStructure,
        scaling: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.structure, ctx.scaling = structure, scaling
        attended = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for tile in structure.tiles:
            keys, values = _columns(key, tile.keys), _columns(value, tile.keys)
            queries = query[:, :, tile.start : tile.stop]
            result = _attend(queries, keys, values, structure, tile, scaling)
            attended[:, tile.start : tile.stop] = result.transpose(1, 2)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (gradient,) = gradients  # [1, T, H, E]
        query, key, value = ctx.saved_tensors
        query_gradient = torch.empty_like(query)
        # A shared prefix gathers from many tiles: not in half precision, as one kernel would not either.
        key_gradient = torch.zeros_like(key, dtype=_accumulation_dtype(key.dtype))
        value_gradient = torch.zeros_like(value, dtype=_accumulation_dtype(value.dtype))
        for tile in ctx.structure.tiles:
            queries = _leaf(query[:, :, tile.start : tile.stop])
            keys, values = _leaf(_columns(key, tile.keys)), _leaf(_columns(value, tile.keys))
            with torch.enable_grad():
                result = _attend(queries, keys, values, ctx.structure, tile, ctx.scaling)
            outer = gradient[:, tile.start : tile.stop].transpose(1, 2)
            of_queries, of_keys, of_values = torch.autograd.grad(result, (queries, keys, values), outer)
            query_gradient[:, :, tile.start : tile.stop] = of_queries
            _add_columns(key_gradient, tile.keys, of_keys)
            _add_columns(value_gradient, tile.keys, of_values)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, structure: TiledStructure, tile: Tile, scaling: float | None
) -> Tensor:
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=structure.mask(tile),
        is_causal=tile.causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _columns(values: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """[1, K, T, D] -> the columns in `ranges`; a view where they are contiguous."""
    if len(ranges) == 1:
        return values[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([values[:, :, start:stop] for start, stop in ranges], dim=2)


def _add_columns(values: Tensor, ranges: tuple[Range, ...], added: Tensor) -> None:
    first = 0
    for start, stop in ranges:
        values[:, :, start:stop] += added[:, :, first : first + stop - start]
        first += stop - start
