"""Log-probs of chosen tokens under logits, without a second tensor of the logits' size.

``log p(token) = logit[token] - logsumexp(logits)``. Written with ordinary autograd operations this keeps a
float32 copy of every selected row of the logits alive until the backward pass: at 8,192 tokens and a
vocabulary of 150,000 that is 4.9 GB. Here the forward pass walks the rows in blocks and keeps one number a
row; the backward pass recomputes the softmax block by block, straight into the gradient of the logits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import DataError, ShapeMismatchError

_ELEMENTS_PER_BLOCK = 1 << 24
"""Float32 values in one block of rows, 64 MiB: enough to keep a device busy, small beside the logits."""


def selected_logprobs(logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
    """Log-prob of ``token_ids[i]`` under the prediction in ``logits[rows[i]]``.

    The softmax is computed in float32, whatever the logits' dtype (float64 for float64). Rows that are not
    named are never read and get a gradient of exactly zero, also when they hold infinities or NaN.

    Args:
        logits: ``[R, V]``, any floating dtype.
        rows: ``[N]``, int64, each in ``[0, R)``.
        token_ids: ``[N]``, int64, each in ``[0, V)``.

    Returns:
        ``[N]``, float32 (float64 if the logits are), differentiable once with respect to ``logits``.

    Raises:
        ShapeMismatchError: if the shapes are not the ones above.
        DataError: if a token id is outside the vocabulary.
    """
    if logits.ndim != 2 or rows.ndim != 1 or rows.shape != token_ids.shape:
        raise ShapeMismatchError(
            "selected_logprobs needs logits [R, V], rows [N] and token_ids [N]; found "
            f"logits {list(logits.shape)}, rows {list(rows.shape)}, token_ids {list(token_ids.shape)}"
        )
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < logits.shape[1]:
        raise DataError(
            f"token ids run from {int(token_ids.min())} to {int(token_ids.max())}, the model's logits cover "
            f"0 to {logits.shape[1] - 1}: environment and trainer use different tokenizers or models"
        )
    # torch declares no types for Function.apply.
    return cast("Tensor", _SelectedLogProbs.apply(logits, rows, token_ids))  # type: ignore[no-untyped-call]


class _SelectedLogProbs(torch.autograd.Function):
    """The blocked computation; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
        precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
        normalizers = torch.empty(rows.shape, dtype=precision, device=logits.device)  # [N]
        chosen = torch.empty_like(normalizers)  # [N]
        for block in _blocks(rows.numel(), logits.shape[1]):
            block_logits = logits.index_select(0, rows[block]).to(precision)  # [n, V]
            normalizers[block] = torch.logsumexp(block_logits, dim=-1)
            chosen[block] = block_logits.gather(1, token_ids[block, None]).squeeze(1)
        ctx.save_for_backward(logits, rows, token_ids, normalizers)
        return chosen - normalizers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor, None, None]:
        logits, rows, token_ids, normalizers = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)  # [R, V]
        for block in _blocks(rows.numel(), logits.shape[1]):
            # d logprob / d logits = one_hot(token) - softmax(logits)
            gradient = logits.index_select(0, rows[block]).to(normalizers.dtype)  # [n, V]
            gradient.sub_(normalizers[block, None]).exp_().neg_()
            gradient.scatter_add_(1, token_ids[block, None], gradient.new_ones(gradient.shape[0], 1))
            gradient.mul_(grad_logprobs[block, None])
            add_rows(grad_logits, rows[block], gradient)
        return grad_logits, None, None


def add_rows(into: Tensor, index: Tensor, values: Tensor) -> None:
    """`into[index] += values`, in an order that does not change from run to run."""
    values = values.to(into.dtype)
    if into.is_cuda:  # index_add_ adds atomically there; index_put_ sorts
        into.index_put_((index,), values, accumulate=True)
    else:  # here it is index_put_ that adds atomically
        into.index_add_(0, index, values)


def _blocks(count: int, vocabulary: int) -> list[slice]:
    """Cut ``count`` rows into slices of at most ``_ELEMENTS_PER_BLOCK`` logits."""
    size = max(1, _ELEMENTS_PER_BLOCK // max(1, vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
