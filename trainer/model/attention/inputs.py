"""Keyword arguments of a model's forward for a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigurationError
from trainer.model.attention.flex import FlexStructure
from trainer.model.attention.tile_plan import TiledStructure
from trainer.model.sequence_parallel import SequenceGroup
from trainer.packing import MicroBatch, Packing

TILED = "atropos_tiled"


FLEX = "atropos_flex"


STRUCTURE = "row_structure"
"""Keyword argument of the model's forward, and so of the attention function, that describes the row."""


GROUP = "sequence_group"
"""The same of the processes that the row's columns are split over."""


OWN = {"tiled": TILED, "flex": FLEX}
"""The back-ends of this package by their names in the configuration."""


_TAKES_A_MASK = ("sdpa", "eager")


def model_inputs(inner: Any, batch: MicroBatch, group: SequenceGroup | None = None) -> dict[str, Any]:
    """Keyword arguments of the model's forward for a micro-batch.

    Args:
        inner: The model of transformers, unwrapped; its configuration names its attention.
        batch: On the model's device.
        group: The processes that the row is split over; `batch` holds our columns of it.
    """
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.subtree_end is None:
        return {**inputs, "attention_mask": batch.attention_mask}
    implementation = getattr(inner.config, "_attn_implementation", None)
    if group is not None:
        inputs[GROUP] = group
    device = batch.input_ids.device
    if implementation == TILED:
        structure: Any = TiledStructure(batch.subtree_end, device, batch.longest_sequence)
        return {**inputs, "attention_mask": _nothing(device), STRUCTURE: structure}
    if implementation == FLEX:
        structure = FlexStructure.of(batch.subtree_end, device, batch.longest_sequence)
        return {**inputs, "attention_mask": _nothing(device), STRUCTURE: structure}
    if batch.packing == "plain":
        # transformers finds the sequences by their restarting positions, and honours sliding windows.
        return {**inputs, "attention_mask": None}
    mask = dense_mask(batch.subtree_end.to(device))
    if implementation == "eager":
        mask = additive(mask, next(inner.parameters()).dtype)
    return {**inputs, "attention_mask": mask}


def _nothing(device: torch.device) -> Tensor:
    """A mask that transformers hands on as it is, for back-ends that do not read it.

    Without one it would build a mask of all pairs from the positions.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def takes_trees(implementation: str | None) -> bool:
    """Whether an attention implementation can be told to attend along a tree."""
    return implementation in (TILED, FLEX, *_TAKES_A_MASK)


def loaded_implementation(setting: str) -> str | None:
    """Name the implementation to load a model with for `model.attention`; None: transformers' choice.

    Our back-ends are switched to afterwards, once the model has shown that it can take them.
    """
    if setting == "auto":
        return None
    return "sdpa" if setting in OWN else setting


def readable(implementation: str | None) -> str:
    """The name of an implementation as the configuration has it."""
    return next((name for name, known in OWN.items() if known == implementation), str(implementation))


def require_splittable(inner: Any, packing: Packing, group: SequenceGroup) -> None:
    """See that the rows of a model's micro-batches can be split over processes.

    Raises:
        ConfigurationError: They cannot.
    """
    asked = f"parallel.sequence is {group.size}, but {type(inner).__name__}"
    config = inner.config.get_text_config()
    implementation = getattr(inner.config, "_attn_implementation", None)
    heads = getattr(config, "num_attention_heads", None)
    if packing == "padded":
        raise ConfigurationError(
            f"parallel.sequence is {group.size}, but sequences are padded, one to a row, and such rows are "
            "not split: because of data.packing padded, or because the model takes no others; set "
            "parallel.sequence to 1, or data.packing to auto if it is not"
        )
    if implementation not in OWN.values():
        raise ConfigurationError(
            f"{asked} has the attention {implementation}, which does not split rows; set model.attention to "
            "tiled or flex, or parallel.sequence to 1"
        )
    if not heads or heads % group.size:
        raise ConfigurationError(
            f"{asked} has {heads} attention heads, which cannot be divided so; set a divisor of {heads}"
        )


def dense_mask(subtree_end: Tensor) -> Tensor:
    """[T] int64 -> [1, 1, T, T] bool, True where query (row) attends to key (column)."""
    columns = torch.arange(len(subtree_end), device=subtree_end.device)
    query = columns[:, None]
    return ((columns <= query) & (query < subtree_end))[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
