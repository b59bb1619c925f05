"""Keys and values of all running sequences, as one dense block that grows and shrinks with the batch.

Rows `0 .. rows-1` are always in use: when a sequence ends, the last row moves into its place. So a decoding
step reads plain slices, with no gathering. Not here: any reuse between requests; there is no prefix cache.
"""

from __future__ import annotations

import torch

_COLUMN_STEP = 64
"""Capacity grows in steps of this many columns at least, so that not every token means a new allocation."""


class KeyValuePool:
    """Keys and values `[layers, rows, heads, columns, head size]` and each row's length.

    Args:
        layers: Number of attention layers.
        heads: Key/value heads per layer.
        head_size: Channels per head.
        dtype: Of keys and values.
        budget: Most columns over all rows that spare capacity may take up.
    """

    def __init__(self, *, layers: int, heads: int, head_size: int, dtype: torch.dtype, budget: int) -> None:
        self._shape = (layers, heads, head_size)
        self._dtype = dtype
        self._budget = budget
        self._keys = self._empty(0, 0)
        self._values = self._empty(0, 0)
        self.lengths: list[int] = []
        """Columns in use, per row."""

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def keys(self) -> torch.Tensor:
        """[layers, row capacity, heads, column capacity, head size]."""
        return self._keys

    @property
    def values(self) -> torch.Tensor:
        """Like `keys`."""
        return self._values

    def add_rows(self, count: int) -> range:
        """Take `count` new, empty rows into use and return their numbers."""
        first = self.rows
        self.lengths.extend([0] * count)
        return range(first, self.rows)

    def reserve(self, columns: int) -> None:
        """Make room for all rows in use and for `columns` columns in each."""
        used = max(self.lengths, default=0)
        columns = max(columns, used)
        row_capacity, column_capacity = self._keys.shape[1], self._keys.shape[3]
        if self.rows <= row_capacity and columns <= column_capacity:
            return
        row_capacity = max(row_capacity, self.rows)
        if columns > column_capacity:
            column_capacity = _round_up(max(columns, column_capacity * 5 // 4))
        if row_capacity * column_capacity > self._budget:
            row_capacity, column_capacity = self.rows, _round_up(columns)
        for name in ("_keys", "_values"):
            old: torch.Tensor = getattr(self, name)
            new = self._empty(row_capacity, column_capacity)
            kept = min(old.shape[1], self.rows)
            new[:, :kept, :, :used] = old[:, :kept, :, :used]
            setattr(self, name, new)

    def copy_columns(self, source: int, targets: list[int], columns: int) -> None:
        """Give the rows `targets` the first `columns` columns of the row `source`."""
        for block in (self._keys, self._values):
            block[:, targets, :, :columns] = block[:, source : source + 1, :, :columns]
        for target in targets:
            self.lengths[target] = columns

    def remove(self, row: int) -> int:
        """Free a row; return the number of the row that moved into its place (`row` itself if none did)."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            for block in (self._keys, self._values):
                block[:, row, :, :length] = block[:, last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()
        return last

    def release(self) -> None:
        """Drop every row and give the memory back, with whatever stands in it."""
        self.lengths.clear()
        self._keys = self._empty(0, 0)
        self._values = self._empty(0, 0)

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        layers, heads, head_size = self._shape
        # Zeros, not uninitialised memory: masked columns are still multiplied, and 0 * NaN is NaN.
        return torch.zeros(layers, rows, heads, columns, head_size, dtype=self._dtype)


def _round_up(columns: int) -> int:
    return -(-columns // _COLUMN_STEP) * _COLUMN_STEP
