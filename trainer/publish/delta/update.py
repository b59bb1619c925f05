"""What a version changes, in the rows of all processes that share the weights, as one process would find it.

With whole weights nothing is exchanged. Where they are spread, one thread in each process goes through these
steps while the next step trains:

    sum_up   each compares its own rows; a line of numbers for each tensor, to process 0
    choose   what of each tensor travels, told by process 0
    parts    changes, or rows, of one tensor after the other, to process 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.model.base_checkpoint import StoredTensor
from trainer.model.sharding import WHOLE, Spread
from trainer.model.weight_stream import dtype_name
from trainer.publish.delta.bits import (
    Change,
    NumpyArray,
    bits,
    escapes,
    model_checksum,
    pack_gaps,
    packed_layout,
    wrapped,
)
from trainer.publish.delta.snapshot import Snapshot

_NOTHING, _CHANGED, _ALL = range(3)
"""What travels of a tensor."""

_SUM, _START, _SIZE, _COUNT, _FAR, _FIRST, _LAST, _ESCAPED = range(8)
"""Columns of the table, the last one twice. A count of -1: most has changed."""

_COMPARED_AHEAD = 4
"""Tensors that are compared at the same time, where there are copies of all of them anyway."""


class Update:
    """One version's changes. Made by every process from the live weights, and used once.

    Args:
        snapshot: This process's part of the version before. It goes on to this one in `sum_up`, and stays so
            until all has been sent.
        version: The version's number.
        weights: This process's part of the live weights.
        spread: How weights are spread over processes.
        at_once: Compare the weights here, without a copy of more than one.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        version: int,
        weights: Iterable[tuple[str, Tensor]],
        spread: Spread = WHOLE,
        *,
        at_once: bool = False,
    ) -> None:
        self.first = snapshot.version is None
        """Whether there is nothing that it applies to."""
        self.spread = spread
        self.tensors: dict[str, StoredTensor] = {}
        """All of the version's tensors, whole; from `sum_up` on, on process 0."""
        self.sums: dict[str, int] = {}
        """Of the bits of each; likewise."""
        self.checksum = ""
        """Of the whole model's bits; likewise."""
        self.parts: Iterator[tuple[str, Tensor]] = self._exchange()
        """What `choose` has laid out, on process 0; the others send their rows for it, to the end."""
        self._snapshot = snapshot
        self._version = version
        copies = snapshot.copies(weights)
        self._copies: Iterable[tuple[str, Tensor]] | None = copies if at_once else list(copies)
        self._ahead = 0 if at_once else _COMPARED_AHEAD
        self._changes: dict[str, Change | None] | None = None
        if at_once:
            self._compare()
        self._table: list[list[list[int]]] | None = None  # [tensor, process, column]
        self._kinds: list[int] | None = None

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype_name(self) -> str:
        """The type that most of the numbers have."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
        return dtype_name(max(sizes, key=lambda dtype: sizes[dtype]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of which anything travels, by name."""
        pairs = zip(self.tensors.items(), self._kinds or (), strict=True)
        return {name: tensor.shape for (name, tensor), kind in pairs if kind != _NOTHING}

    def sum_up(self) -> None:
        """Bring snapshot, sums and checksum up to this version."""
        self._compare()
        self._snapshot.sum_up(self._changes)
        own = torch.tensor([self._row(name) for name in self._snapshot.tensors], dtype=torch.int64)
        table = self.spread.collect(own)
        self._table = [] if table is None else table.transpose(0, 1).tolist()
        for (name, tensor), rows in zip(self._snapshot.tensors.items(), self._table, strict=False):
            self.tensors[name] = StoredTensor(tensor.dtype, _whole_shape(tensor, rows))
            self.sums[name] = wrapped(sum(row[_SUM] for row in rows))
        self.checksum = model_checksum(self.sums, self.tensors)

    def choose(self, *, whole: bool) -> dict[str, StoredTensor]:
        """Decide what travels.

        Args:
            whole: All of the version. On other processes than 0 it does not matter.

        Returns:
            What `parts` gives: of each tensor `<name>:gaps`, `<name>:moves` and `<name>:values`, or all under
            its name.
        """
        kinds: list[int] = []
        layout: dict[str, StoredTensor] = {}
        for (name, tensor), rows in zip(self.tensors.items(), self._table or (), strict=True):
            counts, kind, laid_out = [row[_COUNT] for row in rows], _ALL, {name: tensor}
            if not whole and not any(counts):
                kind, laid_out = _NOTHING, {}
            elif not whole and min(counts) > -1:
                changed = _layout(name, tensor, rows)
                if sum(each.nbytes for each in changed.values()) < tensor.nbytes:
                    kind, laid_out = _CHANGED, changed
            kinds.append(kind)
            layout |= laid_out
        self._tell(kinds)
        return layout

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors as they are until the next version is taken; of weights that are not spread."""
        yield from self._snapshot.tensors.items()

    def finish(self) -> None:
        """Take part in what is left, for whatever use process 0 has."""
        if self._table is None:
            self.sum_up()
        if self._kinds is None:
            self._tell([_NOTHING] * len(self.tensors))
        for _ in self.parts:
            pass
        self._changes = {}

    def _compare(self) -> None:
        if self._copies is not None:
            self._changes = self._snapshot.advance(self._version, self._copies, ahead=self._ahead)
            self._copies = None

    def _tell(self, kinds: list[int]) -> None:
        told = torch.tensor(kinds if self.spread.rank == 0 else [0] * len(self._snapshot.tensors))
        self.spread.tell(told)
        self._kinds = told.tolist()

    def _row(self, name: str) -> list[int]:
        tensor = self._snapshot.tensors[name]
        own = [self._snapshot.sums[name], self._snapshot.start(name), tensor.numel()]
        change = self._change(name)
        if change is not None:
            far = len(change.far)
            return [*own, change.count, far, change.first, change.last, *escapes(change.between)]
        changed = tensor.numel() and (self._changes is None or name in self._changes)
        return [*own, -1 if changed else 0, 0, 0, 0, 0, 0]

    def _change(self, name: str) -> Change | None:
        """What changed in this process's rows; None: nothing, or most of them."""
        return (self._changes or {}).get(name)

    def _exchange(self) -> Iterator[tuple[str, Tensor]]:
        for number, (name, kind) in enumerate(zip(self._snapshot.tensors, self._kinds or (), strict=True)):
            if kind == _NOTHING:
                continue
            if self.spread.rank > 0:
                self._send(name, kind)
            elif kind == _ALL:
                yield name, self._receive_all(name, (self._table or [])[number])
            else:
                gaps, moves, far = self._receive_changed(name, (self._table or [])[number])
                yield f"{name}:gaps", pack_gaps(gaps)
                yield f"{name}:moves", moves
                yield f"{name}:values", far.view(self.tensors[name].dtype)

    def _send(self, name: str, kind: int) -> None:
        rank = self.spread.rank
        if kind == _ALL:
            self.spread.hand_over(self._snapshot.tensors[name].cpu(), rank)
            return
        change = self._change(name)
        if change is not None:
            for each in _tensors(change):
                self.spread.hand_over(each, rank)

    def _receive_all(self, name: str, rows: list[list[int]]) -> Tensor:
        own, shape = self._snapshot.tensors[name], self.tensors[name].shape
        if own.shape == shape:
            return own
        whole = torch.empty(shape, dtype=own.dtype)
        for rank, row in enumerate(rows):
            part = whole.view(-1)[row[_START] : row[_START] + row[_SIZE]]
            if rank == 0:
                part.copy_(own.reshape(-1))
            else:
                self.spread.hand_over(part, rank)
        return whole

    def _receive_changed(self, name: str, rows: list[list[int]]) -> tuple[NumpyArray, Tensor, Tensor]:
        """Put the changes together in the order of the processes, which is that of their rows."""
        own = self._change(name)
        if len(rows) == 1 and own is not None:
            return own.gaps, own.moves, own.far
        counts, fars = ([row[column] for row in rows] for column in (_COUNT, _FAR))
        gaps = torch.empty(sum(counts), dtype=torch.int64)
        moves = torch.empty(sum(counts), dtype=torch.int8)
        far = torch.empty(sum(fars), dtype=bits(self._snapshot.tensors[name]).dtype)
        parts = zip(
            *(torch.split(*each) for each in ((gaps, counts), (moves, counts), (far, fars))), strict=True
        )
        before = -1
        for rank, (row, received) in enumerate(zip(rows, parts, strict=True)):
            if rank > 0:
                for each in received:
                    self.spread.hand_over(each, rank)
            elif own is not None:
                for each, given in zip(received, _tensors(own), strict=True):
                    each.copy_(given)
            if row[_COUNT]:
                received[0][0] = row[_FIRST] - before - 1
                before = row[_LAST]
        return gaps.numpy(), moves, far


def _tensors(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps as int64, moves, and bits that moved far."""
    return torch.from_numpy(change.gaps.astype(np.int64)), change.moves, change.far


def _whole_shape(own: Tensor, rows: list[list[int]]) -> tuple[int, ...]:
    size = sum(row[_SIZE] for row in rows)
    if size == own.numel():
        return tuple(own.shape)
    return size // own.shape[1:].numel(), *own.shape[1:]


def _layout(name: str, tensor: StoredTensor, rows: list[list[int]]) -> dict[str, StoredTensor]:
    """The changes of one tensor, packed as if they had been found by one process."""
    escaped, before, count = [0, 0], -1, 0
    for row in rows:
        if row[_COUNT]:
            between = escapes(np.array([row[_FIRST] - before - 1]))
            inside = row[_ESCAPED:]
            escaped = [sum(each) for each in zip(escaped, between, inside, strict=True)]
            before, count = row[_LAST], count + row[_COUNT]
    return {
        f"{name}:gaps": packed_layout(count, escaped),
        f"{name}:moves": StoredTensor(torch.int8, (count,)),
        f"{name}:values": StoredTensor(tensor.dtype, (sum(row[_FAR] for row in rows),)),
    }
