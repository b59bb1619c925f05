"""Keyword arguments of a model's forward for a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.attention._dense import additive, dense_mask
from trainer.attention._flex import FlexStructure
from trainer.attention._names import FLEX, STRUCTURE, TILED
from trainer.attention._tiles import TiledStructure
from trainer.packing import MicroBatch


def model_inputs(inner: Any, batch: MicroBatch) -> dict[str, Any]:
    """Keyword arguments of the model's forward for a micro-batch.

    Args:
        inner: The model of transformers, unwrapped; its configuration names its attention.
        batch: On the model's device.
    """
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.subtree_end is None:
        return {**inputs, "attention_mask": batch.attention_mask}
    implementation = getattr(inner.config, "_attn_implementation", None)
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
