"""Estimates the cost of a pass over the model before it runs, to share work out evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FORWARD_AND_BACKWARD = 3.0
"""A backward pass has two products for each one of the forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Floating-point operations of a forward and backward pass, a multiply-add counted as two.

    `cost = per_token * computed tokens + per_pair * visible pairs + per_trained_token * trained tokens`,
    where a visible pair is a token and one that it attends to, itself included.
    """

    per_token: float = 1.0
    """Linear layers: 6 for each of their weights."""
    per_pair: float = 0.0
    """Attention: 12 a layer for each dimension of all heads (scores and weighted sum)."""
    per_trained_token: float = 0.0
    """Language-model head: 6 for each of its weights."""

    @classmethod
    def of_config(cls, config: Any) -> PassCost:
        """Estimate from a model's configuration.

        Counted are the projections of attention and the feed-forward layers; of experts those that one
        token passes. Unusual architectures are estimated roughly: only the proportions matter. Without
        attention (Mamba, RWKV) a pair costs nothing.
        """
        hidden = _number(config, "hidden_size") or 1
        layers = _number(config, "num_hidden_layers") or 1
        heads = _number(config, "num_attention_heads")
        attention = pairs = 0.0
        if heads:
            key_heads = _number(config, "num_key_value_heads") or heads
            head_size = _number(config, "head_dim") or hidden / heads
            attention = hidden * head_size * (2 * heads + 2 * key_heads)
            pairs = 2 * heads * head_size
        width, matrices = _feed_forward(config, hidden)
        multiply_add = 2.0
        each = multiply_add * _FORWARD_AND_BACKWARD
        return cls(
            per_token=each * layers * (attention + matrices * hidden * width),
            per_pair=each * layers * pairs,
            per_trained_token=each * hidden * (_number(config, "vocab_size") or 1),
        )

    def of(self, *, tokens: float, pairs: float, trained: float) -> float:
        """The cost of so many computed tokens, visible pairs and trained tokens."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_trained_token * trained


def visible_pairs(lengths: NDArray[np.int64], shared: NDArray[np.int64]) -> int:
    """Pairs of a token and one it attends to, in a tree of sequences that share so much with the one before.

    The token at depth t attends to t + 1 tokens, and sequence i adds the depths shared[i] .. lengths[i] - 1.
    """
    return int((lengths * (lengths + 1) - shared * (shared + 1)).sum()) // 2


def _feed_forward(config: Any, hidden: float) -> tuple[float, int]:
    """Width of the feed-forward layers a token passes, and how many matrices they have (3 with a gate)."""
    experts = _number(config, "num_experts_per_tok")
    width = (_number(config, "moe_intermediate_size") if experts else 0) or _number(
        config, "intermediate_size"
    )
    if not width:  # GPT-2 and its kin: two matrices, four times as wide unless said otherwise
        return _number(config, "n_inner") or 4 * hidden, 2
    return width * (experts or 1), 3


def _number(config: Any, name: str) -> float:
    """A number of the configuration; the mean of a list by layers; 0 where there is none."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple) and value:
        value = sum(value) / len(value)
    return float(value) if isinstance(value, int | float) else 0.0
