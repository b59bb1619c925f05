"""The input of one forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Packing = Literal["prefix_tree", "plain", "padded"]

_STAYS_ON_CPU = {"subtree_end", "origins"}  # attention plans and records are made from them there


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward and backward pass.

    B rows of T columns (one row unless padded); N trained tokens in all. Entry n says: the prediction made
    at (`predict_row[n]`, `predict_column[n]`) is of token `targets[n]`. Several entries may share a
    prediction: the token after a branch point is supervised for every branch.

    Example:
        The sequences `1 2 3`, `1 2 4 5` and `1 9`, folded::

            input_ids    [[1, 2, 3, 4, 5, 9]]
            position_ids [[0, 1, 2, 2, 3, 1]]
            subtree_end  [ 6, 5, 3, 5, 5, 6]    column k is seen from columns k .. subtree_end[k] - 1
    """

    packing: Packing
    input_ids: Tensor
    """[B, T] int64."""
    position_ids: Tensor
    """[B, T] int64: depth of each token in its own sequence."""
    subtree_end: Tensor | None
    """[T] int64, on the CPU: one past the last column of the subtree below each column. Columns stand in
    depth-first order, so token q attends to token k exactly if `k <= q < subtree_end[k]`. None: padded."""
    attention_mask: Tensor | None
    """[B, T] int64, 1 for tokens and 0 for padding. None: nothing is padded."""
    predict_row: Tensor
    """[N] int64."""
    predict_column: Tensor
    """[N] int64."""
    targets: Tensor
    """[N] int64."""
    loss_mask: Tensor
    """[N] float32."""
    advantages: Tensor
    """[N] float32."""
    denominator: Tensor
    """[N] float32: what each token's loss is divided by, so that the step's micro-batches add up."""
    temperature: Tensor
    """[N] float32."""
    inference_logprobs: Tensor | None
    """[N] float32; None if any sample lacks them: a loss needs them all, or none."""
    known_inference_logprobs: Tensor
    """[N] float32, NaN where the environment sent none: for metrics."""
    ref_logprobs: Tensor | None
    """[N] float32."""
    sequence_ids: Tensor
    """[N] int64: which of its sequences each token belongs to. A sequence is whole in one micro-batch."""
    origins: Tensor
    """[sequence_count, 2] int64, on the CPU: which sequence of which group of the batch each is."""
    sequence_count: int
    sequence_tokens: int
    """Tokens of its sequences, before folding and without padding."""
    longest_sequence: int
    """Tokens of its longest sequence."""
    padding_tokens: int
    """Columns that hold no token."""
    cost: float
    """Estimated floating-point operations of its forward and backward pass."""
    teacher_token_ids: Tensor | None = None
    """[N, K] int64: a teacher's candidates for each token, -1 beyond those of a token. None: not wanted."""
    teacher_logprobs: Tensor | None = None
    """[N, K] float32, minus infinity where there is no candidate."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy with every tensor that the model reads on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name not in _STAYS_ON_CPU
        }
        return replace(self, **moved)

    def without_weight(self) -> MicroBatch:
        """Return a copy that contributes nothing: for processes that have fewer micro-batches."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))
