"""Shares a step out: process 0 sends each process its part, as tensors, never as a pickle.

Process 0 prepares and packs a step. All processes get equally many micro-batches, so that none waits for
ever, and what a loss wants to know of the whole step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import torch
from torch import Tensor

from trainer.packing import MicroBatch

_ALIGNMENT: Final = 8
"""Bytes: that of the widest numbers, as which memory is looked at where they are sent."""

_COLUMNS: Final = ("inference_logprobs", "advantages", "loss_mask")


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
        """Return it as one tensor, [bytes] uint8: a text in JSON that describes it, and its tensors."""
        tensors: list[Tensor] = []

        def described(values: Mapping[str, Any]) -> dict[str, Any]:
            """With dtype and shape, as a list, for each tensor."""
            result = dict(values)
            for name, value in values.items():
                if isinstance(value, Tensor):
                    result[name] = [str(value.dtype).removeprefix("torch."), *value.shape]
                    tensors.append(value)
            return result

        share = described(vars(self) | {"micro_batches": None, "columns": None})
        share["columns"] = described(self.columns)
        share["micro_batches"] = [described(vars(each)) for each in self.micro_batches]
        text = json.dumps(share).encode()
        parts = [torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors]
        whole = torch.empty(sum(_aligned(part.nbytes) for part in parts), dtype=torch.uint8)
        start = 0
        for part in parts:
            whole[start : start + part.nbytes] = part.reshape(-1).view(torch.uint8)
            start += _aligned(part.nbytes)
        return whole

    @classmethod
    def from_bytes(cls, whole: Tensor) -> Self:
        """Read what `to_bytes` made; the tensors share its memory."""
        size = int(whole[:_ALIGNMENT].view(torch.int64))
        start = _ALIGNMENT + _aligned(size)
        share = json.loads(whole[_ALIGNMENT : _ALIGNMENT + size].numpy().tobytes())

        def restored(values: dict[str, Any]) -> dict[str, Any]:
            nonlocal start
            for name, value in values.items():
                if isinstance(value, list):
                    dtype, shape = getattr(torch, value[0]), value[1:]
                    past = start + dtype.itemsize * math.prod(shape)
                    values[name] = whole[start:past].view(dtype).reshape(shape)
                    start += _aligned(past - start)
            return values

        columns = restored(share.pop("columns"))
        micro_batches = [MicroBatch(**restored(each)) for each in share.pop("micro_batches")]
        return cls(columns=columns, micro_batches=micro_batches, **share)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


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
