"""A tile's queries and keys, laid out for products of matrices, and their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.attention._tiles import Range, Tile, TiledStructure


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
