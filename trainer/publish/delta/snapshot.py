"""The bits that were published last, beside the live model, and what a new version changes in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.publish.delta.bits import bits, differing, element_sum, put, take, tensor_sum, wrapped


@dataclass(frozen=True)
class Change:
    """What a version changes in one tensor."""

    indices: Tensor | None
    """Places in the whole tensor, flat, ascending [N], int64. None: most changed, and it travels whole."""
    values: Tensor | None
    """The numbers at these places [N]."""
    moved: int
    """By how much the tensor's sum changes; of a tensor that travels whole it is computed anew."""


class Snapshot:
    """Holds a copy of every published tensor, or of this process's part. Not for several threads at a time.

    Args:
        device: Where the copy is. None: beside each weight.
        starts: Of what this process holds a part: the place of the part's first number in the whole tensor.
    """

    def __init__(self, device: torch.device | None = None, starts: Mapping[str, int] | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        """In the order of the model, contiguous."""
        self.version: int | None = None
        """The version that they are; None before the first, and after a failure half-way."""
        self.sums: dict[str, int] = {}
        """Of the version whose changes were summed up last, of this process's numbers."""
        self._summed: int | None = None
        """The version that the sums are of."""
        self._device = device
        self._starts = starts or {}

    def advance(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Change] | None:
        """Go on to a version.

        Args:
            version: Its number.
            weights: Every weight, the same ones as before.

        Returns:
            What changed, by name. None: this is the first version.
        """
        if self._summed != self.version:
            self.sums = {}
        first, self.version = self.version is None, None  # until all of them are taken
        changes: dict[str, Change] = {}
        for name, tensor in weights:
            if first:
                self.tensors[name] = tensor.detach().to(self._device or tensor.device, copy=True)
            elif (change := self._take(name, tensor.detach())) is not None:
                changes[name] = change
            del tensor  # before the next one is made
        self.version = version
        return None if first else changes

    def start(self, name: str) -> int:
        """Return the place of the first number that this process holds of a tensor."""
        return self._starts.get(name, 0)

    def sum_up(self, changes: Mapping[str, Change] | None) -> None:
        """Bring the sums up to this version, by what `advance` has returned."""
        if changes is None or not self.sums:
            self.sums = {name: self._sum(name) for name in self.tensors}
        else:
            for name, change in changes.items():
                if change.indices is None:
                    self.sums[name] = self._sum(name)
                else:
                    self.sums[name] = wrapped(self.sums[name] + change.moved)
        self._summed = self.version

    def _sum(self, name: str) -> int:
        return tensor_sum(self.tensors[name], self.start(name))

    def _take(self, name: str, tensor: Tensor) -> Change | None:
        before = self.tensors[name]
        old, new = bits(before).reshape(-1), bits(tensor).reshape(-1)
        # Compared where the snapshot is: what leaves the weight's device is compared after it.
        new = new.to(old.device)
        # A place takes a byte at least: with more of them all of the tensor takes fewer.
        indices = differing(old, new, at_most=old.nbytes // (old.itemsize + 1))
        if indices is None:
            old.copy_(new)
            return Change(None, None, 0)
        if not len(indices):
            return None
        values, former = take(new, indices), take(old, indices)
        put(old, indices, values)
        start = self.start(name)
        places = indices + start if start else indices
        moved = element_sum(places, values) - element_sum(places, former)
        return Change(places.cpu(), values.view(before.dtype).cpu(), moved)
