"""How a micro-batch is handed to a model: its tokens, their positions, and who attends to whom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.packing import MicroBatch


def model_inputs(inner: Any, batch: MicroBatch) -> dict[str, Any]:
    """Keyword arguments of the model's forward for a micro-batch.

    Args:
        inner: The model of transformers, unwrapped; its configuration names its attention.
        batch: On the model's device.
    """
    return {
        "input_ids": batch.input_ids,
        "attention_mask": _attention_mask(inner, batch),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def _attention_mask(inner: Any, batch: MicroBatch) -> Tensor:
    """The mask as the model's attention reads it: eager attention adds the mask, it does not select."""
    mask = batch.attention_mask
    if mask.dtype != torch.bool or getattr(inner.config, "_attn_implementation", None) != "eager":
        return mask
    dtype: torch.dtype = next(inner.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
