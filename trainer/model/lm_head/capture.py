"""Runs a model up to its head: the hidden states that the head would get, and no logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def capture_hidden_states(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Hidden states [B, T, H] exactly as the model's forward hands them to its head, with gradient.

    The head itself gets an empty slice of them, so it computes nothing.

    Args:
        model: Wrapped or not; its forward calls `head`.
        head: A module of `model`.
        inputs: Keyword arguments of the forward, among them `input_ids` [B, T].

    Raises:
        ValueError: The forward does not call `head` once, with the hidden states of every token.
    """
    captured: list[Tensor] = []

    def take_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(take_input)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ValueError(f"the model calls its head {len(captured)} times in one forward pass, not once")
    hidden = captured[0]
    if hidden.ndim != 3 or hidden.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"the model's head gets {list(hidden.shape)}, not one row for each of the "
            f"{list(inputs['input_ids'].shape)} tokens"
        )
    return hidden
