"""Splits the columns of a micro-batch over the processes of a group (Ulysses, https://arxiv.org/abs/2309.14509).

    own columns    embedding, norms, projections, feed-forward layers, head
    all columns    attention, for some of the heads: exchanges before and after it turn all heads of own
                   columns into some heads of all columns, and back
    all tokens     the loss: every process of the group computes it from the log-probs of all

So attention back-ends see whole rows, and trees stay as they are. Heads of keys and values that are fewer
than the processes are repeated, each for the query heads that it serves. Nothing else in a model may look at
other columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from trainer.packing import MicroBatch


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """The processes that compute the same micro-batches together, and our place among them."""

    size: int
    rank: int
    group: ProcessGroup | None
    """None: all processes."""

    def own(self, batch: MicroBatch) -> MicroBatch:
        """Return the part of a micro-batch that this process computes.

        Its columns, and the tokens that are predicted from them; `subtree_end` stays that of the whole row.
        A row of fewer columns than processes is filled up by ones that nothing is predicted from.

        Raises:
            ValueError: The micro-batch is padded.
        """
        if batch.subtree_end is None:
            raise ValueError("a padded micro-batch has no row that could be split over processes")
        length = batch.input_ids.shape[1]
        filling = max(0, self.size - length)
        first, past = self._own_columns(length)
        mine = self._predicted_here(batch)
        candidates = batch.teacher_token_ids
        return replace(
            batch,
            input_ids=pad(batch.input_ids, (0, filling))[:, first:past],
            position_ids=pad(batch.position_ids, (0, filling))[:, first:past],
            subtree_end=torch.cat([batch.subtree_end, torch.arange(length, length + filling) + 1]),
            predict_row=batch.predict_row[mine],
            predict_column=batch.predict_column[mine] - first,
            targets=batch.targets[mine],
            temperature=batch.temperature[mine],
            teacher_token_ids=candidates[mine] if candidates is not None else None,
        )

    def everybodys(self, own: Tensor, batch: MicroBatch) -> Tensor:
        """Return what all processes of the group computed for the tokens of a micro-batch.

        Every one differentiates the same loss, so its gradient is that of its own tokens: there is nothing
        to add up.

        Args:
            own: [n, ...] of the tokens of `own(batch)`.
            batch: The whole one, with N tokens.

        Returns:
            [N, ...] in the order of `batch`.
        """
        collect: Any = _Collect.apply
        everybodys: Tensor = collect(own, self._predicted_here(batch), self.group)
        return everybodys

    def attend(
        self,
        kernel: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        structure: Any,
        scaling: float | None,
    ) -> Tensor:
        """Attend from own columns to all columns.

        Args:
            kernel: An attention back-end for whole rows; see `tiled_attention`.
            query: [1, H, t, D] of own columns, H a multiple of the number of processes.
            key: [1, K, t, D].
            value: [1, K, t, E].
            structure: Of the whole row, T columns.
            scaling: Factor of the scores.

        Returns:
            [1, t, H, E].
        """
        repeats = self.size // gcd(key.shape[1], self.size)
        if repeats > 1:
            key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        counts = self._counts(structure.length)
        to_some_heads: Any = _ToSomeHeads.apply
        to_own_columns: Any = _ToOwnColumns.apply
        some = [to_some_heads(each, counts, self) for each in (query, key, value)]
        attended: Tensor = to_own_columns(kernel(*some, structure, scaling).transpose(1, 2), counts, self)
        return attended.transpose(1, 2)

    def _counts(self, length: int) -> list[int]:
        """Columns of each process, of a row of `length`: at least one each."""
        length = max(length, self.size)
        return [length // self.size + (rank < length % self.size) for rank in range(self.size)]

    def _own_columns(self, length: int) -> tuple[int, int]:
        """First own column of a row, and one past the last."""
        counts = self._counts(length)
        first = sum(counts[: self.rank])
        return first, first + counts[self.rank]

    def _predicted_here(self, batch: MicroBatch) -> Tensor:
        """[N] bool: which tokens are predicted from own columns."""
        first, past = self._own_columns(batch.input_ids.shape[1])
        return (batch.predict_column >= first) & (batch.predict_column < past)


def make_sequence_group(size: int, rank: int) -> SequenceGroup:
    """Make a group of every `size` processes that follow one another; all processes have to call it.

    Args:
        size: Divides the number of processes.
        rank: Our place among all.
    """
    new_subgroups: Any = distributed.new_subgroups
    group, _ = new_subgroups(group_size=size)
    return SequenceGroup(size=size, rank=rank % size, group=group)


class _ToSomeHeads(torch.autograd.Function):
    """All heads of own columns -> some heads of all columns."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int], group: SequenceGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _to_some_heads(values, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return _to_own_columns(gradients[0], ctx.counts, ctx.group), None, None


class _ToOwnColumns(torch.autograd.Function):
    """Some heads of all columns -> all heads of own columns."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: list[int], group: SequenceGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _to_own_columns(values, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return _to_some_heads(gradients[0], ctx.counts, ctx.group), None, None


def _to_some_heads(values: Tensor, counts: list[int], group: SequenceGroup) -> Tensor:
    """[1, H, t, D] -> [1, H / N, T, D]."""
    heads, width = values.shape[1] // group.size, values.shape[3]
    sizes = [heads * count * width for count in counts]
    received = _exchange(values.reshape(-1), [values.numel() // group.size] * group.size, sizes, group)
    parts = [
        part.view(heads, count, width)
        for part, count in zip(torch.split(received, sizes), counts, strict=True)
    ]
    return torch.cat(parts, dim=1)[None]


def _to_own_columns(values: Tensor, counts: list[int], group: SequenceGroup) -> Tensor:
    """[1, H / N, T, D] -> [1, H, t, D]."""
    heads, width = values.shape[1], values.shape[3]
    parts = [part.reshape(-1) for part in torch.split(values[0], counts, dim=1)]
    own = counts[group.rank]
    received = _exchange(
        torch.cat(parts), [len(part) for part in parts], [heads * own * width] * group.size, group
    )
    return received.view(1, group.size * heads, own, width)


def _exchange(sent: Tensor, sent_sizes: list[int], received_sizes: list[int], group: SequenceGroup) -> Tensor:
    received = sent.new_empty(sum(received_sizes))
    distributed.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group.group)
    return received


class _Collect(torch.autograd.Function):
    """Values of own tokens -> values of all tokens; the gradient is cut to own ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, mine: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(mine)
        everybodys = own.new_zeros(len(mine), *own.shape[1:])
        everybodys[mine] = own
        distributed.all_reduce(everybodys, group=group)  # each token is one process's: zeros are added
        return everybodys

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (mine,) = ctx.saved_tensors
        return gradients[0][mine], None, None
