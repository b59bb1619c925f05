"""What each process computes of a step, and how process 0 sends it: as tensors, never as a pickle.

Process 0 prepares and packs a step. All processes get equally many micro-batches, so that none waits for
ever, and what a loss wants to know of the whole step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer.packing import MicroBatch

_COLUMNS = ("inference_logprobs", "advantages", "loss_mask")


@dataclass(frozen=True, kw_only=True)
class StepShare:
    """One process's share of a step."""

    micro_batches: list[MicroBatch]
    step: int
    """Steps done before it."""
    staleness: int | None
    """Versions between the one that was served when the batch arrived and ours; None if that is not known."""
    has_reference: bool
    """Whether any micro-batch of the step, of whichever process, came with a reference's log-probs."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Advantages, mask and the sampler's log-probs, [N] each, of all trained tokens of the step, for a loss
    with statistics of the step; else empty."""

    def to_bytes(self) -> Tensor:
        """Return it as one tensor, [bytes] uint8."""
        tensors = {f"column.{name}": column for name, column in self.columns.items()}
        plain = [
            {name: value for name, value in vars(each).items() if not isinstance(value, Tensor)}
            for each in self.micro_batches
        ]
        for index, micro_batch in enumerate(self.micro_batches):
            for name, value in vars(micro_batch).items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{name}"] = value
        header = {"step": self.step, "staleness": self.staleness, "has_reference": self.has_reference}
        text = json.dumps({**header, "micro_batches": plain}).encode()
        tensors["header"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        # Copies: views of one tensor are refused.
        whole = save({name: tensor.clone() for name, tensor in tensors.items()})
        return torch.frombuffer(bytearray(whole), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, whole: Tensor) -> Self:
        """Read what `to_bytes` made."""
        tensors = load(whole.numpy().tobytes())
        header = json.loads(tensors.pop("header").numpy().tobytes())
        columns: dict[str, Tensor] = {}
        micro_batches: list[dict[str, Any]] = header.pop("micro_batches")
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            (columns if index == "column" else micro_batches[int(index)])[name] = tensor
        return cls(micro_batches=[MicroBatch(**each) for each in micro_batches], columns=columns, **header)


def share_out(
    micro_batches: Sequence[MicroBatch],
    processes: int,
    *,
    step: int,
    staleness: int | None,
    with_columns: bool,
) -> list[StepShare]:
    """Share a step out among processes: process r computes what stands at r, r + processes...

    A process that would have one less than others gets one that weighs nothing.

    Args:
        micro_batches: All of the step, at least one, in the order in which `pack` returns them.
        processes: How many there are.
        step: See `StepShare`.
        staleness: See `StepShare`.
        with_columns: Whether the loss takes statistics of the whole step.
    """
    rounds = math.ceil(len(micro_batches) / processes)
    columns = {}
    if with_columns:
        columns = {
            name: torch.cat([getattr(micro_batch, name) for micro_batch in micro_batches])
            for name in _COLUMNS
        }
    shares = []
    for rank in range(processes):
        share = list(micro_batches[rank::processes])
        if len(share) < rounds:
            share.append(min(micro_batches, key=lambda each: each.cost).without_weight())
        shares.append(
            StepShare(
                micro_batches=share,
                step=step,
                staleness=staleness,
                has_reference=any(each.ref_logprobs is not None for each in micro_batches),
                columns=columns,
            )
        )
    return shares
