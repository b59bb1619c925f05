"""Inputs of every loss function, and the one place where masking and reduction happen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.errors import DataError, MissingLogProbsError, ShapeMismatchError

DENOMINATOR_EPSILON = 1e-8
"""Keeps "no trained token at all" at 0 / 1e-8 = 0 instead of 0 / 0; the seed's constant."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """Everything a loss may look at, token-aligned, in tensors of one shape.

    Column ``t`` of every tensor speaks of token ``t``: the shift between a prediction and its token has
    already happened, next to the language-model head. The shape is free (``[B, T]`` padded, ``[N]`` packed).

    Example: the prompt ``What is 2+2? `` and the reply ``4.``, sampled by the inference server::

        logprobs            [ 0.00, 0.00, 0.00, -0.22, -0.11]    the trainer's, with gradient
        advantages          [ 0.00, 0.00, 0.00,  1.50,  1.50]
        loss_mask           [ 0,    0,    0,     1,     1   ]
        inference_logprobs  [ 1.00, 1.00, 1.00, -0.25, -0.11]    the sampler's; 1.0 is filler where masked

    Where ``loss_mask`` is 0 the other tensors may hold anything, infinities and NaN included: neither the
    value nor the gradient of a loss depends on it.

    Attributes:
        logprobs: The trainer's log-prob of each token, float32 or float64, with gradient.
        advantages: Weight of each token; positive makes it more likely.
        loss_mask: 0 where a token is not trained, 1 where it is; other non-negative values weigh tokens.
            A negative one would turn the token's loss around.
        inference_logprobs: The sampler's log-prob of each token, or None if the environment sent none.
        ref_logprobs: A frozen reference model's log-prob of each token, or None.
        denominator: What the sum over tokens is divided by. A number or 0-dim tensor (> 0), usually the
            trained tokens of the *whole* optimizer step, so that the losses of its micro-batches add up to
            the loss of the step; or a tensor that broadcasts to the shape, for reductions per sequence. None:
            this call's own ``loss_mask.sum() + 1e-8``.
        staleness: How many versions older than the policy the sampler's was, for `decoupled_ppo`. None: not
            known.
        sequence_ids: Which sequence each token belongs to, int64 from 0; a sequence is never split over
            two calls. None: each row of ``[B, T]`` is one.
        sequence_count: How many sequences there are, more than the largest of ``sequence_ids``. None: one
            more than that, which is looked up, and an accelerator is waited for.
        statistics: What the loss's ``step_statistics`` made of the whole step. None: it makes them of these
            tokens.

    Raises:
        ShapeMismatchError: if the tensors do not share one shape.
        DataError: if ``logprobs`` has less than float32 precision, the denominator is not positive,
            or ``sequence_ids`` is not int64; of tensors on the CPU also if ``loss_mask`` has a value that is
            negative or not finite, or ``sequence_ids`` one outside of 0 to ``sequence_count - 1``. Values on
            an accelerator are not looked at: it would be waited for.
    """

    logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    inference_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    denominator: float | Tensor | None = None
    staleness: int | None = None
    sequence_ids: Tensor | None = None
    sequence_count: int | None = None
    statistics: Any = None

    def __post_init__(self) -> None:
        self._refuse_unequal_shapes()
        if self.logprobs.dtype not in (torch.float32, torch.float64):
            raise DataError(
                f"logprobs are {self.logprobs.dtype}; sums over tokens need float32 or float64: "
                "compute the log-softmax in float32"
            )
        self._refuse_bad_denominator()
        self._refuse_bad_mask()
        self._refuse_bad_sequence_ids()

    @cached_property
    def mask(self) -> Tensor:
        """``loss_mask`` in the precision of the log-probs (bfloat16 cannot even count to 300)."""
        return self.loss_mask.to(self.logprobs.dtype)

    @cached_property
    def trained(self) -> Tensor:
        """True where a token is trained; same shape, bool."""
        return self.loss_mask != 0

    def at_trained_tokens(self, values: Tensor) -> Tensor:
        """``values`` in the loss's precision, with exact zeros where the mask is 0.

        A selection, not a product: 0 * inf would be NaN, in the value or in the gradient.
        """
        values = values.to(self.logprobs.dtype)
        return torch.where(self.trained, values, torch.zeros_like(values))

    def sampler_logprobs(self, loss_name: str) -> Tensor:
        """The sampler's log-probs at trained tokens, for a loss that cannot do without them.

        Raises:
            MissingLogProbsError: if there are none.
        """
        if self.inference_logprobs is None:
            raise MissingLogProbsError(
                f"{loss_name} needs inference_logprobs (the sampler's log-prob of each token) and got None: "
                "let the environment send them (ManagedServer does), or choose loss.name weighted_sft"
            )
        return self.at_trained_tokens(self.inference_logprobs).detach()

    def weighted_sum(self, per_token: Tensor) -> Tensor:
        """Sum of ``per_token`` times the mask over the trained tokens, 0-dim."""
        return (self.at_trained_tokens(per_token) * self.mask).sum()

    def sequence_sum(self, per_token: Tensor) -> Tensor:
        """Give each token the sum of ``per_token`` over the trained tokens of its own sequence; same shape.

        The mask selects here, it does not weigh: a sum over log-probs is the log-prob of the whole sequence.

        Raises:
            DataError: if tokens are packed in one row and ``sequence_ids`` is None.
        """
        ids, count = self._sequences  # [N], N tokens of any shape
        values = self.at_trained_tokens(per_token)
        sums = values.new_zeros(count).index_add(0, ids, values.flatten())
        return sums.index_select(0, ids).view_as(values)

    def sequence_mean(self, per_token: Tensor) -> Tensor:
        """Give each token the mean of ``per_token`` over the trained tokens of its own sequence; same shape.

        0 where a sequence has no trained token.

        Raises:
            DataError: if tokens are packed in one row and ``sequence_ids`` is None.
        """
        return self.sequence_sum(per_token) / self.sequence_sum(self.trained).clamp(min=1)

    def sequence_max(self, per_token: Tensor) -> Tensor:
        """Give each token the maximum of ``per_token`` over the trained tokens of its sequence; same shape.

        Values are 0 or more; 0 where a sequence has no trained token.

        Raises:
            DataError: if tokens are packed in one row and ``sequence_ids`` is None.
        """
        ids, count = self._sequences
        values = self.at_trained_tokens(per_token)
        largest = values.new_zeros(count).scatter_reduce(0, ids, values.flatten(), "amax")
        return largest.index_select(0, ids).view_as(values)

    @cached_property
    def _sequences(self) -> tuple[Tensor, int]:
        if self.sequence_ids is not None:
            ids, count = self.sequence_ids.flatten(), self.sequence_count
            if count is None:
                count = int(ids.max()) + 1 if ids.numel() else 0
            return ids, count
        if self.logprobs.ndim != 2:
            raise DataError(
                f"logprobs of shape {list(self.logprobs.shape)} do not say which token belongs to which "
                "sequence; pass sequence_ids"
            )
        rows, columns = self.logprobs.shape
        return torch.arange(rows, device=self.logprobs.device).repeat_interleave(columns), rows

    def reduce(self, per_token: Tensor) -> Tensor:
        """``sum(per_token * mask) / denominator``, 0-dim."""
        if self.denominator is None:
            return self.weighted_sum(per_token) / (self.mask.sum() + DENOMINATOR_EPSILON)
        if isinstance(self.denominator, Tensor) and self.denominator.ndim > 0:
            # A wholly masked sequence may come with a denominator of 0: its share is 0, not 0 / 0.
            share = self.at_trained_tokens(self.mask / self.denominator.to(self.logprobs.dtype))
            return (self.at_trained_tokens(per_token) * share).sum()
        return self.weighted_sum(per_token) / self.denominator

    def _refuse_unequal_shapes(self) -> None:
        tensors = {
            "logprobs": self.logprobs,
            "advantages": self.advantages,
            "loss_mask": self.loss_mask,
            "inference_logprobs": self.inference_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "sequence_ids": self.sequence_ids,
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ShapeMismatchError(f"a loss needs tensors of one shape, one column a token; found {listed}")

    def _refuse_bad_denominator(self) -> None:
        if isinstance(self.denominator, Tensor):
            # Values are not looked at: that would stop the accelerator once per micro-batch.
            try:
                self.denominator.expand(self.logprobs.shape)
            except RuntimeError as error:
                raise ShapeMismatchError(
                    f"denominator {list(self.denominator.shape)} does not broadcast to "
                    f"the tokens' shape {list(self.logprobs.shape)}"
                ) from error
        elif self.denominator is not None and not self.denominator > 0:
            raise DataError(
                f"denominator is {self.denominator}; pass the step's number of trained tokens (> 0), "
                "and skip a step that has none"
            )

    def _refuse_bad_mask(self) -> None:
        mask = self.loss_mask
        if mask.device.type != "cpu" or mask.dtype is torch.bool:
            return
        bad = ~((mask >= 0) & mask.isfinite())
        if bool(bad.any()):
            raise DataError(
                f"loss_mask has {mask[bad][0].item():g} at {bad.nonzero()[0].tolist()}; pass 0 for a token "
                "that is not trained, 1 for one that is, or another weight that is 0 or more"
            )

    def _refuse_bad_sequence_ids(self) -> None:
        ids = self.sequence_ids
        if ids is None:
            return
        if ids.dtype is not torch.int64:
            raise DataError(
                f"sequence_ids are {ids.dtype}; pass the number of each token's sequence as int64"
            )
        if ids.device.type != "cpu" or not ids.numel():
            return
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0:
            raise DataError(f"sequence_ids has {smallest}; number the sequences from 0")
        if self.sequence_count is not None and largest >= self.sequence_count:
            raise DataError(
                f"sequence_ids has {largest}, but sequence_count is {self.sequence_count}; pass at least "
                f"{largest + 1}, or None to have it looked up"
            )
