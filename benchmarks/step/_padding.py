"""Plain Hugging Face padding: what one writes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.step._cases import Case, Row
from benchmarks.step._contender import Contender, Setting, autocast, clipped_surrogate, mean_of_means

__all__ = ["PlainPadding", "float32_gradients", "micro_batched", "padded"]


class PlainPadding(Contender):
    """Right-padded rows, `model(...).logits`, `log_softmax` everywhere, gathered at the targets.

    In the batch's order, as many rows a micro-batch as fit the token budget. Its loss is ours (`ppo_clip`,
    mean over sequences of the mean over tokens), its model and autocast too.
    """

    name = "padding"
    label = "plain Hugging Face padding"

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        super().__init__(setting)
        self._model = model
        self._micro_batches: list[dict[str, Tensor]] = []
        self._sequences = 0

    @property
    def model(self) -> nn.Module:
        """That of `ours`."""
        return self._model

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        return sum(batch["input_ids"].numel() for batch in self._micro_batches)

    def prepare(self, case: Case) -> None:
        """Pad."""
        self._sequences = len(case.rows)
        self._micro_batches = [
            {name: values.to(self.setting.device) for name, values in _tensors(rows).items()}
            for rows in micro_batched(case.rows, self.setting.micro_batch_tokens)
        ]

    def step(self) -> float:
        """Forward and backward of each micro-batch."""
        self._model.train()
        model: Any = self._model
        loss = 0.0
        for batch in self._micro_batches:
            with autocast(self.setting):
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)  # [B, T - 1, V]
            chosen = logprobs.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)  # [B, T - 1]
            per_token = clipped_surrogate(chosen, batch["sampler"][:, 1:], batch["advantages"])
            share = mean_of_means(per_token, batch["mask"][:, 1:], self._sequences)
            share.backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
        return loss


def float32_gradients(setting: Setting, case: Case) -> dict[str, Tensor]:
    """Compute a batch's gradients as plainly as can be: padding, float32, transformers' own attention.

    On a copy of the model that nothing of ours has touched. The gradients of every contender, whatever its
    dtype, are compared with these: in bfloat16 none of them could be the truth for the others.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    padding = PlainPadding(replace(setting, dtype=torch.float32), model.to(setting.device))
    padding.prepare(case)
    padding.step()
    return padding.gradients()


def micro_batched(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Cut rows, in order, where their number times the longest passes the budget."""
    part: list[Row] = []
    longest = 0
    for row in rows:
        longer = max(longest, len(row.tokens))
        if part and (len(part) + 1) * longer > budget:
            yield part
            part, longer = [], len(row.tokens)
        part.append(row)
        longest = longer
    if part:
        yield part


def padded(rows: list[list[Any]], filler: float) -> Tensor:
    """Rows as one tensor [B, T], filled at the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def _tensors(rows: list[Row]) -> dict[str, Tensor]:
    return {
        "input_ids": padded([row.tokens for row in rows], 0),
        "attention_mask": padded([[1] * len(row.tokens) for row in rows], 0),
        "mask": padded([[float(on) for on in row.trained] for row in rows], 0.0),
        "sampler": padded([row.sampler_logprobs for row in rows], 1.0),
        "advantages": torch.tensor([[row.advantage] for row in rows]),
    }
