"""FlexAttention with block masks made from the rule, never a mask of all pairs.

Rows are filled up to whole blocks inside, and the kernel is compiled once, with dynamic shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

BLOCK = 128
_FEWEST_BLOCKS = 2
"""torch.compile makes a kernel of its own for sizes of 1."""


@dataclass(frozen=True, kw_only=True)
class FlexStructure:
    """The blocks of a row that hold a visible pair."""

    block_mask: BlockMask
    length: int
    """Columns T of the row; those up to the next multiple of the block size are filled up."""
    longest: int
    """Tokens of the longest sequence."""

    @classmethod
    def of(cls, subtree_end: Tensor, device: torch.device, longest: int) -> FlexStructure:
        """Build from `subtree_end` [T] int64, on the CPU.

        Of a block of queries and one of keys: no pair is visible if the keys come later or all their
        subtrees end before; all are if the keys come first and none of their subtrees ends within.
        """
        length = len(subtree_end)
        blocks = max(_FEWEST_BLOCKS, -(-length // BLOCK))
        filled = torch.arange(1, blocks * BLOCK + 1)  # a filling column sees itself, which keeps it finite
        filled[:length] = subtree_end
        by_block = filled.view(blocks, BLOCK)
        first = torch.arange(blocks) * BLOCK
        earliest_end, latest_end = by_block.min(1).values, by_block.max(1).values
        visible = (first <= first[:, None]) & (latest_end > first[:, None])  # [query block, key block]
        full = (first < first[:, None]) & (earliest_end >= first[:, None] + BLOCK)
        partial_count, partial_index = _ordered(visible & ~full)
        full_count, full_index = _ordered(full)
        end = filled.to(device)

        def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < end[key])

        block_mask = BlockMask.from_kv_blocks(
            partial_count.to(device),
            partial_index.to(device),
            full_count.to(device),
            full_index.to(device),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(blocks * BLOCK, blocks * BLOCK),
        )
        return cls(block_mask=block_mask, length=length, longest=longest)


def flex_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, structure: FlexStructure, scaling: float | None
) -> Tensor:
    """Attend along a tree; see `tiled_attention` for shapes. Compiled on a GPU, slow elsewhere."""
    filling = (0, 0, 0, structure.block_mask.seq_lengths[0] - structure.length)
    attend = compiled_flex_attention() if query.device.type == "cuda" else flex_attention
    attended: Any = attend(
        pad(query, filling),
        pad(key, filling),
        pad(value, filling),
        block_mask=structure.block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    result: Tensor = attended[:, :, : structure.length].transpose(1, 2).contiguous()
    return result


@cache
def compiled_flex_attention(backend: str | Any = "inductor") -> Any:
    """The one compiled kernel of this process, for rows of any length."""
    return torch.compile(flex_attention, dynamic=True, backend=backend)


def _ordered(present: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, K] bool -> how many of each row, [1, 1, Q] int32, and which first, [1, 1, Q, K] int32."""
    count = present.sum(1).to(torch.int32)
    index = (~present).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    return count[None, None], index[None, None]
