"""The back-ends as transformers calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer.model.attention.flex import flex_tree_attention
from trainer.model.attention.inputs import FLEX, GROUP, STRUCTURE, TILED
from trainer.model.attention.tiled import tiled_attention

_CHANGES_SCORES = ("softcap", "s_aux", "position_bias")
"""Keyword arguments by which a model asks for more than scaled dot products."""


def register_backends() -> None:
    """Make our names known to transformers. Harmless to repeat."""
    for name, kernel in ((TILED, tiled_attention), (FLEX, flex_tree_attention)):
        AttentionInterface.register(name, _as_transformers_calls_it(name, kernel))
        AttentionMaskInterface.register(name, sdpa_mask)  # for rows without our structure


def _as_transformers_calls_it(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend along the row's structure; as `sdpa` does where there is none.

        Raises:
            ValueError: The model asks for something that this back-end does not compute.
        """
        structure = arguments.pop(STRUCTURE, None)
        group = arguments.pop(GROUP, None)
        if structure is None:
            plain: Callable[..., Any] = AttentionInterface()["sdpa"]
            result: tuple[Tensor, Tensor | None] = plain(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
            )
            return result
        asked = [what for what in _CHANGES_SCORES if arguments.get(what) is not None]
        asked += ["dropout"] if dropout > 0 else []
        window = arguments.get("sliding_window")
        asked += [f"a window of {window} tokens"] if window is not None and window < structure.longest else []
        if asked:
            raise ValueError(f"the model asks its attention for {', '.join(asked)}, which {name} does not do")
        inputs = _as_computed(query, key, value)
        if group is not None:
            return group.attend(kernel, *inputs, structure, scaling), None
        return kernel(*inputs, structure, scaling), None

    return attention


def _as_computed(*values: Tensor) -> tuple[Tensor, ...]:
    """In one type: that of autocast where it is on, which knows `sdpa` but not our functions."""
    device = values[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(value.to(dtype) for value in values)
    return values
