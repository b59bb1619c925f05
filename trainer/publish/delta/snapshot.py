"""The bits that were published last, beside the live model, and what a new version changes in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.publish.delta.bits import bits, differences, element_sum, tensor_sum, wrapped


@dataclass(frozen=True)
class Change:
    """What a version changes in one tensor."""

    places: Tensor
    """In the whole tensor, flat, ascending [N], int64."""
    former: Tensor
    """The bits at these places before [N]."""
    values: Tensor
    """Those there now [N]."""


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

    def copies(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Copy weights to where the snapshot is, each when it is asked for."""
        for name, tensor in weights:
            copy = tensor.detach().to(
                self._device or tensor.device, copy=True, memory_format=torch.contiguous_format
            )
            del tensor  # which may have been made for this
            yield name, copy
            del copy

    def advance(self, version: int, copies: Iterable[tuple[str, Tensor]]) -> dict[str, Change | None] | None:
        """Go on to a version.

        Args:
            version: Its number.
            copies: Of every weight, the same ones as before. They are kept, and those before let go of.

        Returns:
            What changed, by name; None where most did. None: this is the first version.
        """
        if self._summed != self.version:
            self.sums = {}
        first, self.version = self.version is None, None  # until all of them are taken
        changes: dict[str, Change | None] = {}
        for name, copy in copies:
            if not first:
                changes |= self._compare(name, copy)
            self.tensors[name] = copy
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

    def _compare(self, name: str, copy: Tensor) -> dict[str, Change | None]:
        old, new = (bits(each).reshape(-1) for each in (self.tensors[name], copy))
        # Of many changes the places take more time and memory than they save bytes: then all of it travels.
        found = differences(old, new, at_most=old.nbytes // (old.itemsize + 1))
        if found is None:
            return {name: None}
        places, former, values = (each.cpu() for each in found)
        places += self.start(name)
        return {name: Change(places, former, values)} if len(places) else {}
