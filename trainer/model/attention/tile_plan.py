"""Which keys each tile of queries can see.

A tile is a run of neighbouring columns. The keys that some query of it sees are the ancestors of its first
column, which lie in a few contiguous ranges, and the tile's own columns: nothing else, because an ancestor
of any query of the tile that lies before the tile is an ancestor of its first column too.

The plan is made once a micro-batch and used by every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Range = tuple[int, int]
"""First column, and one past the last."""

_TILE = 128
"""Columns of a tile. Fewer cost time in starting kernels, more in pairs that are masked."""
_MOST_STORED_PAIRS = 1 << 26
"""Masks of so many pairs (bytes) are stored; beyond, they are made again wherever they are used."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Queries `start .. stop - 1` and the keys that one of them sees."""

    start: int
    stop: int
    keys: tuple[Range, ...]
    """In rising order; the last ends at `stop`."""


class TiledStructure:
    """The tiles of a row, with their masks.

    Args:
        subtree_end: [T] int64, on the CPU.
        device: Where masks are wanted.
        longest: Tokens of the longest sequence.
    """

    def __init__(self, subtree_end: Tensor, device: torch.device, longest: int) -> None:
        self.length = len(subtree_end)
        self.longest = longest
        self._subtree_end = subtree_end.to(device)
        self.tiles = list(plan_tiles(subtree_end.numpy()))
        pairs = sum((tile.stop - tile.start) * _length(tile.keys) for tile in self.tiles)
        self._masks: dict[int, _Masks] | None = {} if pairs <= _MOST_STORED_PAIRS else None

    def visible(self, tile: Tile) -> Tensor:
        """[queries, keys] bool, True where a query sees a key."""
        return self._masks_of(tile).visible

    def hide(self, scores: Tensor, tile: Tile) -> None:
        """Set scores [K, G * L, S] of keys that a query does not see to -infinity, in place."""
        masks = self._masks_of(tile)
        if masks.first < scores.shape[2]:
            rows = scores.view(scores.shape[0], -1, len(masks.visible), scores.shape[2])
            rows[..., masks.first :].masked_fill_(masks.hidden, -torch.inf)

    def _masks_of(self, tile: Tile) -> _Masks:
        if self._masks is None:
            return self._make_masks(tile)
        if tile.start not in self._masks:
            self._masks[tile.start] = self._make_masks(tile)
        return self._masks[tile.start]

    def _make_masks(self, tile: Tile) -> _Masks:
        device = self._subtree_end.device
        keys = torch.cat([torch.arange(start, stop, device=device) for start, stop in tile.keys])
        ends = self._subtree_end[keys]
        queries = torch.arange(tile.start, tile.stop, device=device)[:, None]
        visible = (keys <= queries) & (queries < ends)
        # The deeper an ancestor, the earlier its subtree ends: those that all see come first.
        first = int(((keys < tile.start) & (ends >= tile.stop)).sum())
        return _Masks(visible=visible, first=first, hidden=~visible[:, first:])


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """Masks of a tile: which query sees which key."""

    visible: Tensor
    """[queries, keys] bool."""
    first: int
    """Keys before this one are seen by all queries: masking is the slowest pass over scores."""
    hidden: Tensor
    """[queries, keys from `first`] bool."""


def plan_tiles(subtree_end: NDArray[np.int64], size: int = _TILE) -> Iterator[Tile]:
    """Cut a row into tiles of about `size` columns: long runs into even parts, short ones put together.

    Args:
        subtree_end: [T] int64.
        size: Wanted columns of a tile; none has more.
    """
    first = 0  # column of a tile that is being put together
    above: tuple[Range, ...] = ()  # ancestors of `first`
    for start, stop, ancestors in _runs(subtree_end):
        if stop - first > size and first < start:
            yield _tile(first, start, above)
            first = start
        if first == start:
            above = ancestors
        if stop - start > size:
            bounds = np.linspace(start, stop, -(-(stop - start) // size) + 1).astype(int).tolist()
            for left, right in pairwise(bounds):
                yield _tile(left, right, (*ancestors, (start, left)))
            first = stop
    if first < len(subtree_end):
        yield _tile(first, len(subtree_end), above)


def _tile(start: int, stop: int, ancestors: tuple[Range, ...]) -> Tile:
    merged: list[Range] = []
    for left, right in (*ancestors, (start, stop)):
        if merged and merged[-1][1] == left:
            merged[-1] = (merged[-1][0], right)
        elif left < right:
            merged.append((left, right))
    return Tile(start=start, stop=stop, keys=tuple(merged))


def _runs(subtree_end: NDArray[np.int64]) -> Iterator[tuple[int, int, tuple[Range, ...]]]:
    """Yield unbranched runs of columns, each the child of the one before, with the ancestors of the first."""
    total = len(subtree_end)
    leaves = (subtree_end[:-1] == np.arange(1, total)).nonzero()[0]
    starts = [0, *(leaves + 1).tolist()]
    path: list[Range] = []  # ranges that hold the ancestors of the current run
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        while path and subtree_end[path[-1][0]] <= start:
            path.pop()
        if path:  # ends fall along a run: keep the columns whose subtree goes on
            left, right = path[-1]
            kept = int(np.searchsorted(-subtree_end[left:right], -start, side="left"))
            path[-1] = (left, left + kept)
        yield start, stop, tuple(path)
        path.append((start, stop))


def _length(ranges: tuple[Range, ...]) -> int:
    return sum(stop - start for start, stop in ranges)
