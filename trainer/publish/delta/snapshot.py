"""The bits that were published last, beside the live model, and what a new version changes in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.publish.delta.bits import bits, element_sum, take_over, tensor_sum, wrapped


@dataclass(frozen=True)
class Change:
    """What a version changes in one tensor."""

    places: Tensor
    """In the whole tensor, flat, ascending [N], int64."""
    values: Tensor
    """The bits at these places [N]."""
    former: Tensor
    """Those before [N]."""


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

    def advance(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Change | None] | None:
        """Go on to a version.

        Args:
            version: Its number.
            weights: Every weight, the same ones as before.

        Returns:
            What changed, by name; None where most did. None: this is the first version.
        """
        if self._summed != self.version:
            self.sums = {}
        first, self.version = self.version is None, None  # until all of them are taken
        changes: dict[str, Change | None] = {}
        for name, tensor in weights:
            if first:
                device = self._device or tensor.device
                self.tensors[name] = tensor.detach().to(
                    device, copy=True, memory_format=torch.contiguous_format
                )
            else:
                changes |= self._take(name, tensor.detach())
            del tensor  # before the next one is made
        self.version = version
        return None if first else changes

    def start(self, name: str) -> int:
        """Return the place of the first number that this process holds of a tensor."""
        return self._starts.get(name, 0)

    def sum_up(self, changes: Mapping[str, Change | None] | None) -> None:
        """Bring the sums up to this version, by what `advance` has returned."""
        if changes is None or not self.sums:
            self.sums = {name: self._sum(name) for name in self.tensors}
        else:
            for name, change in changes.items():
                if change is None:
                    self.sums[name] = self._sum(name)
                else:
                    moved = element_sum(change.places, change.values) - element_sum(
                        change.places, change.former
                    )
                    self.sums[name] = wrapped(self.sums[name] + moved)
        self._summed = self.version

    def _sum(self, name: str) -> int:
        return tensor_sum(self.tensors[name], self.start(name))

    def _take(self, name: str, tensor: Tensor) -> dict[str, Change | None]:
        old, new = bits(self.tensors[name]).reshape(-1), bits(tensor).reshape(-1)
        # Compared where the snapshot is: what leaves the weight's device is compared after it. Of many
        # changes the places take more time and memory than they save bytes: then all of the tensor travels.
        taken = take_over(old, new.to(old.device), at_most=old.nbytes // (old.itemsize + 1))
        if taken is None:
            return {name: None}
        places, values, former = (each.cpu() for each in taken)
        places += self.start(name)
        return {name: Change(places, values, former)} if len(places) else {}
