"""Scores a step's tokens before the first of them is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from trainer.config import LossSettings
from trainer.model.reference import score
from trainer.model.wrappers import unwrap_training
from trainer.packing import MicroBatch
from trainer.run.train_state import PreparedRun


class StepScores:
    """Completes micro-batches by passes without gradient, before any of them is trained on.

    With the log-probs of the reference model, and with which tokens have the highest entropies of the whole
    step. Where neither is wanted, nothing is computed.
    """

    def __init__(self, settings: LossSettings, prepared: PreparedRun) -> None:
        self._settings = settings
        self._accelerator = prepared.accelerator
        self._spread = prepared.spread
        self._policy = unwrap_training(prepared.model)
        self._head = prepared.head
        self._reference = prepared.reference

    def complete(
        self, micro_batches: list[MicroBatch], *, should_abort: Callable[[], bool]
    ) -> list[MicroBatch] | None:
        """Return the micro-batches of this process, completed; None if `should_abort` said so.

        Every process has to call it, with equally many micro-batches.
        """
        share = self._settings.top_entropy_share
        if self._reference is None and share == 1:
            return micro_batches
        completed: list[MicroBatch] = []
        entropies: list[Tensor] = []
        for batch in micro_batches:
            if should_abort():
                return None
            with self._accelerator.autocast():
                completed.append(self._with_reference(batch))
                if share < 1:
                    entropies.append(self._entropy(batch))
            # Nothing stays gathered: PEFT may say of parts only who is trained.
            self._spread.settle(self._policy)
            if self._reference is not None:
                self._spread.settle(self._reference.model)
        return self._keep_highest(completed, entropies, share) if share < 1 else completed

    def _with_reference(self, batch: MicroBatch) -> MicroBatch:
        if self._reference is None:
            return batch
        logprobs = self._reference.score(batch, use_temperature=self._settings.uses_temperature)
        return replace(batch, ref_logprobs=logprobs)

    def _entropy(self, batch: MicroBatch) -> Tensor:
        """[N], at least 0."""
        use_temperature = self._settings.uses_temperature
        scores = score(
            self._policy,
            batch,
            use_temperature=use_temperature,
            head=self._head,
            group=self._spread.sequence,
        )
        return scores.entropy.clamp(min=0)

    def _keep_highest(
        self, micro_batches: list[MicroBatch], entropies: list[Tensor], share: float
    ) -> list[MicroBatch]:
        """Set the advantages of all tokens to 0 but for the `share` with the highest entropies.

        The denominators stay, and what a loss has beside its advantages stays for every token.
        Source: Wang et al. 2025, Beyond the 80/20 Rule (arXiv 2506.01939).
        """
        own = [entropy[batch.loss_mask > 0] for batch, entropy in zip(micro_batches, entropies, strict=True)]
        # Of those that all processes of a team know, one of them tells.
        told = torch.cat(own) if self._spread.leads_team else own[0][:0]
        padded = self._accelerator.pad_across_processes(told, pad_index=-1)
        everybodys = self._accelerator.gather(padded)
        everybodys = everybodys[everybodys >= 0].sort(descending=True).values
        lowest = (
            float(everybodys[max(1, round(share * len(everybodys))) - 1]) if len(everybodys) else math.inf
        )
        return [
            replace(batch, advantages=batch.advantages.where(entropy >= lowest, 0.0))
            for batch, entropy in zip(micro_batches, entropies, strict=True)
        ]
