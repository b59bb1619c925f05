"""One optimizer step over one batch, under Accelerate.

Every process holds the whole batch, computes its share of the micro-batches, and gradients are summed:
each token's loss is already divided by the whole step's denominator, so nothing is averaged afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.config import LossSettings
from trainer.head import Head
from trainer.logprobs import token_logprobs
from trainer.losses import LossInputs, ResolvedLoss, resolve_loss
from trainer.mismatch import Mismatch, drop_own_comparison, mismatch_sums, take_mismatch
from trainer.model_directory import unwrap
from trainer.packing import MicroBatch, Packing, PassCost, pack
from trainer.preparation import PreparedBatch


class StepGivenUp(Exception):  # noqa: N818 - an event, not a fault
    """A step was given up between two micro-batches; the weights are those before it."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came out of a step, over all processes."""

    loss: float
    """The step's loss; its unit depends on the loss function."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False if loss or gradient were not finite, or the batch was refused: the weights stayed the same."""
    refused: bool
    """The caller did not accept the batch's mismatch."""
    per_token: dict[str, float]
    """The loss function's metrics and the entropy, averaged over computed trained tokens."""
    mismatch: Mismatch | None
    """Trainer against sampler; None if no trained token came with the sampler's log-probs."""
    computed_tokens: int
    """Tokens that went through the model, padding included."""
    sequence_tokens: int
    """Tokens of the computed sequences, each counted in full."""
    padding_tokens: int
    """Computed columns that hold no token."""
    imbalance: float
    """Estimated cost of the slowest process over the mean of all; 1 is even."""
    micro_batches: int


def bind_loss(settings: LossSettings) -> ResolvedLoss:
    """Choose the loss function and give it its options."""
    options: dict[str, float] = {"kl_coefficient": settings.kl_coefficient}
    if settings.name == "policy_gradient":
        options["ratio_cap"] = settings.ratio_cap
    if settings.name == "ppo_clip":
        options |= {"epsilon_low": settings.epsilon_low, "epsilon_high": settings.epsilon_high}
    return resolve_loss(settings.name, **options)


class StepRunner:
    """Runs optimizer steps on a prepared model.

    Args:
        accelerator: Whose `prepare` gave `model` and `optimizer`.
        model: The wrapped model.
        optimizer: The wrapped optimizer.
        loss: The configured loss.
        packing: How sequences share a micro-batch.
        head: How log-probs are had without logits. None: from the model's own logits.
        tokens_per_micro_batch: Token budget of one forward and backward pass.
        max_grad_norm: Gradients are scaled down to this global norm.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: LossSettings,
        packing: Packing,
        head: Head | None,
        tokens_per_micro_batch: int,
        max_grad_norm: float,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._loss = bind_loss(loss)
        self._use_temperature = loss.uses_temperature
        self._packing = packing
        self._head = head
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._max_grad_norm = max_grad_norm
        self._cost = PassCost.of_config(unwrap(model).config.get_text_config())

    def __call__(
        self,
        micro_batches: list[MicroBatch],
        *,
        accepts: Callable[[Mismatch | None], bool] = lambda _: True,
        give_up: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Train on a batch.

        Args:
            micro_batches: What `pack` made of the batch, at least one.
            accepts: Asked before the weights change, with equal numbers on every process.
            give_up: Asked before each micro-batch; all processes have to answer the same.

        Raises:
            StepGivenUp: `give_up` said so.
        """
        sums = self.accumulate(micro_batches, give_up=give_up)
        totals = self._over_processes(sums)
        mismatch = take_mismatch(totals)
        loss = totals.pop("loss")
        tokens = totals.pop("tokens")
        grad_norm = float(self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm))
        refused = not accepts(mismatch)
        applied = math.isfinite(loss) and math.isfinite(grad_norm) and not refused
        if applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            applied=applied,
            refused=refused,
            per_token={name: value / tokens for name, value in totals.items()},
            mismatch=mismatch,
            computed_tokens=sum(micro_batch.computed_tokens for micro_batch in micro_batches),
            sequence_tokens=sum(micro_batch.sequence_tokens for micro_batch in micro_batches),
            padding_tokens=sum(micro_batch.padding_tokens for micro_batch in micro_batches),
            imbalance=self._imbalance(micro_batches),
            micro_batches=len(micro_batches),
        )

    def pack(self, batch: PreparedBatch) -> list[MicroBatch]:
        """What one step over `batch` computes on all processes, in passes that fit the budget.

        Touches neither the model nor this object, so that it may run ahead in another thread.
        """
        return pack(
            batch.samples,
            batch.denominators,
            packing=self._packing,
            tokens_per_micro_batch=self._tokens_per_micro_batch,
            processes=self._accelerator.num_processes,
            cost=self._cost,
        )

    def accumulate(
        self, micro_batches: list[MicroBatch], *, give_up: Callable[[], bool] = lambda: False
    ) -> dict[str, Tensor]:
        """Compute the gradients of a step, replacing those that were there.

        Returns:
            This process's sums of loss, token count and metrics, 0-dim.

        Raises:
            StepGivenUp: `give_up` said so; there are no gradients then.
        """
        share = self._share(micro_batches)
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        if any(micro_batch.ref_logprobs is not None for micro_batch in micro_batches):
            # Micro-batches without them do not report it, and all processes must add up the same names.
            sums["kl_ref"] = torch.zeros((), device=self._accelerator.device)
        for index, micro_batch in enumerate(share):
            if give_up():
                self._optimizer.zero_grad(set_to_none=True)
                raise StepGivenUp
            last = index == len(share) - 1
            # Gradients are exchanged between processes once a step, with the last micro-batch.
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._model):
                for name, value in self._backward(micro_batch).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def _share(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This process's micro-batches; all processes get equally many, so that none waits for ever."""
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        rounds = math.ceil(len(micro_batches) / world)
        share = micro_batches[rank::world]
        if len(share) < rounds:
            share.append(min(micro_batches, key=lambda each: each.cost).without_weight())
        return [micro_batch.to(self._accelerator.device) for micro_batch in share]

    def _imbalance(self, micro_batches: list[MicroBatch]) -> float:
        world = int(self._accelerator.num_processes)
        costs = [sum(each.cost for each in micro_batches[rank::world]) for rank in range(world)]
        return max(costs) * world / sum(costs)

    def _backward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Forward and backward; returns loss, token count and metrics as sums, 0-dim, detached."""
        with self._accelerator.autocast():
            scores = token_logprobs(
                self._model, batch, use_temperature=self._use_temperature, head=self._head
            )
        inputs = LossInputs(
            logprobs=scores.logprobs,
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
            inference_logprobs=batch.inference_logprobs,
            ref_logprobs=batch.ref_logprobs,
            denominator=batch.denominator,
        )
        loss, metrics = self._loss(inputs)
        # Data parallelism averages gradients over processes; ours are shares of a sum.
        self._accelerator.backward(loss * self._accelerator.num_processes)
        return {
            **drop_own_comparison(metrics),
            **mismatch_sums(scores.logprobs.detach(), batch.known_inference_logprobs, batch.loss_mask),
            "entropy": inputs.weighted_sum(scores.entropy),
            "tokens": inputs.mask.sum(),
            "loss": loss.detach(),
        }

    def _over_processes(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Add the sums of all processes."""
        names = sorted(sums)
        stacked = torch.stack([sums[name].to(torch.float64) for name in names])
        reduced = self._accelerator.reduce(stacked, reduction="sum")
        return dict(zip(names, reduced.tolist(), strict=True))
