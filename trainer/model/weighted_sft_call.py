"""Advantage-weighted supervised fine-tuning of a causal language model, in one call.

The function form of the project's first purpose: tokens, advantages and masks of one shape in, a scalar to
differentiate out. The training loop itself packs its sequences and calls :mod:`trainer.losses` directly; this
is for everybody who brings their own batch and their own model.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from trainer.errors import ConfigurationError, DataError, ShapeMismatchError
from trainer.losses import LossInputs, weighted_sft
from trainer.model.lm_head import selected_logprobs

Alignment = Literal["prediction", "token"]
"""Token or prediction that position t of ``advantages`` and ``loss_mask`` speaks of; see the function."""


class CausalLanguageModel(Protocol):
    """Whatever answers ``model(input_ids=...)`` with ``.logits`` ``[B, T, V]``, wrapped or not."""

    def __call__(self, *, input_ids: Tensor) -> Any:
        """Run the model."""


def compute_advantage_weighted_sft_loss(
    model: CausalLanguageModel,
    input_ids: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    alignment: Alignment = "prediction",
) -> Tensor:
    """Cross-entropy of every next token, scaled by its advantage, averaged over the unmasked ones.

    With ``ce[b, t] = -log p(input_ids[b, t + 1] | input_ids[b, :t + 1])`` for ``t`` in ``0 .. T - 2``, and
    ``A`` and ``M`` the advantages and the mask that belong to that prediction::

        loss = sum(ce * A * M) / (sum(M) + 1e-8)

    Source: the Atropos integration for VERL, "token-level advantage-weighted SFT"; with the default alignment
    this is its arithmetic exactly. The alignments differ in which column belongs to a prediction:

    ``"prediction"``
        Position ``t`` weighs the prediction made *from* position ``t``, of token ``t + 1``: ``A`` and ``M``
        are ``advantages[..., :-1]`` and ``loss_mask[..., :-1]``, and the last column is not used.
    ``"token"``
        Position ``t`` weighs token ``t`` itself, as in everything that Atropos sends: ``A`` and ``M`` are
        ``advantages[..., 1:]`` and ``loss_mask[..., 1:]``, and the first column is not used.

    Where the mask is 0, the advantages may hold anything, and so may the logits: neither the loss nor a
    gradient depends on them. A batch without an unmasked prediction gives 0.0 with zero gradients.

    Example:
        Five tokens, of which the last two are the reply that is to be trained::

            input_ids                          [[12,  7,  9, 31,  2]]
            loss_mask, alignment "token"       [[ 0,  0,  0,  1,  1]]
            loss_mask, alignment "prediction"  [[ 0,  0,  1,  1,  0]]

    Args:
        model: A causal language model; called once, as ``model(input_ids=input_ids)``, for its ``.logits``
            ``[B, T, V]``. It may be wrapped by Accelerate, DistributedDataParallel or PEFT.
        input_ids: ``[B, T]``, integers. Pad on the right, with a mask of 0.
        advantages: ``[B, T]``, any real dtype.
        loss_mask: ``[B, T]``: bool or integer 0/1, or non-negative floats that weigh positions.
        alignment: ``"prediction"`` or ``"token"``.

    Returns:
        The loss: 0-dim, float32 (float64 for float64 logits), ready for ``backward()``.

    Raises:
        ShapeMismatchError: if the three tensors are not of one shape ``[B, T]``, or are empty.
        DataError: if ``input_ids`` are not token ids, the mask holds a negative or non-finite value (Atropos
            masks hold -100 and token ids: convert them), or an unmasked advantage is not finite.
        ConfigurationError: if there is no such alignment.
    """
    if alignment not in get_args(Alignment):
        raise ConfigurationError(f"alignment is {alignment!r}; allowed are 'prediction' and 'token'")
    _refuse_unequal_shapes(input_ids, advantages, loss_mask)
    _refuse_bad_token_ids(input_ids)
    _refuse_bad_mask(loss_mask)
    columns = slice(None, -1) if alignment == "prediction" else slice(1, None)
    trained = loss_mask[:, columns] != 0  # [B, T - 1]
    trained_advantages = advantages[:, columns][trained]  # [N]
    _refuse_non_finite(trained_advantages)

    logits = model(input_ids=input_ids).logits
    if logits.shape[:-1] != input_ids.shape:
        raise ShapeMismatchError(
            f"the model answered logits {list(logits.shape)} for input_ids {list(input_ids.shape)}; "
            "one row of logits per token is needed"
        )
    row, column = trained.nonzero(as_tuple=True)  # [N], [N]; position `column` predicts token `column + 1`
    logprobs = selected_logprobs(
        logits.flatten(0, 1),
        (row * input_ids.shape[1] + column).to(logits.device),
        input_ids[row, column + 1].long().to(logits.device),
    )  # [N]
    loss, _ = weighted_sft(
        LossInputs(
            logprobs=logprobs,
            advantages=trained_advantages.to(logprobs),
            loss_mask=loss_mask[:, columns][trained].to(
                logprobs
            ),  # its sum is the whole mask's: the rest is 0
        )
    )
    return loss


def _refuse_unequal_shapes(input_ids: Tensor, advantages: Tensor, loss_mask: Tensor) -> None:
    shapes = [input_ids.shape, advantages.shape, loss_mask.shape]
    if len(set(shapes)) > 1 or input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ShapeMismatchError(
            "input_ids, advantages and loss_mask must share one shape [batch, tokens], at least one token; "
            f"found input_ids {list(shapes[0])}, advantages {list(shapes[1])}, loss_mask {list(shapes[2])}"
        )


def _refuse_bad_token_ids(input_ids: Tensor) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise DataError(f"input_ids are {input_ids.dtype}; token ids are integers, as int64")
    lowest = int(input_ids.min())
    if lowest < 0:
        raise DataError(
            f"input_ids hold {lowest}, which is no token id; mark positions to leave out in loss_mask instead"
        )


def _refuse_bad_mask(loss_mask: Tensor) -> None:
    if loss_mask.is_complex():
        raise DataError(f"loss_mask is {loss_mask.dtype}; use bool, integer or float")
    if loss_mask.is_floating_point():
        if not bool((torch.isfinite(loss_mask) & (loss_mask >= 0)).all()):
            raise DataError("loss_mask holds negative or non-finite values; weights are finite and >= 0")
    elif loss_mask.dtype != torch.bool and not bool(((loss_mask == 0) | (loss_mask == 1)).all()):
        raise DataError(
            f"an integer loss_mask holds only 0 and 1; found values from {int(loss_mask.min())} to "
            f"{int(loss_mask.max())}. Atropos masks hold -100 and token ids: pass (masks != -100)"
        )


def _refuse_non_finite(trained_advantages: Tensor) -> None:
    bad = int((~torch.isfinite(trained_advantages)).sum())
    if bad:
        raise DataError(
            f"{bad} of {trained_advantages.numel()} advantages at unmasked positions are NaN or infinite; "
            "mask those positions or repair the advantages"
        )
