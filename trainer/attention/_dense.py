"""The attention rule as a mask of all pairs: the reference, for back-ends that take nothing better."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_mask(subtree_end: Tensor) -> Tensor:
    """[T] int64 -> [1, 1, T, T] bool, True where query (row) attends to key (column)."""
    columns = torch.arange(len(subtree_end), device=subtree_end.device)
    query = columns[:, None]
    return ((columns <= query) & (query < subtree_end))[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
