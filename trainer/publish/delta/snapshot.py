"""The bits that were published last, beside the live model, and what a new version changes in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.weight_stream import dtype_name
from trainer.publish.delta.bits import bits, differing, element_sum, model_checksum, tensor_sum, wrapped


@dataclass(frozen=True)
class Change:
    """What a version changes in one tensor."""

    indices: Tensor | None
    """Flat places in ascending order [N], int64. None: most of it changed, and it travels whole."""
    values: Tensor | None
    """The numbers at these places [N]."""
    moved: int
    """By how much the tensor's sum changes; of a tensor that travels whole it is computed anew."""


class Snapshot:
    """Holds a copy of every published tensor. Not for several threads at a time.

    Args:
        device: Where the copy is. None: beside each weight.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        """In the order of the model, contiguous."""
        self.version: int | None = None
        """The version that they are; None before the first, and after a failure half-way."""
        self.checksum = ""
        """Of the version whose changes were summed up last."""
        self.sums: dict[str, int] = {}
        self._summed: int | None = None
        """The version that the sums are of."""
        self._device = device

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype_name(self) -> str:
        """The type that most of the numbers have."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.numel()
        return dtype_name(max(sizes, key=lambda dtype: sizes[dtype]))

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
        self.version = version
        return None if first else changes

    def sum_up(self, changes: dict[str, Change] | None) -> None:
        """Bring the sums and the checksum up to this version, by what `advance` has returned."""
        if changes is None or not self.sums:
            self.sums = {name: tensor_sum(tensor) for name, tensor in self.tensors.items()}
        else:
            for name, change in changes.items():
                if change.indices is None:
                    self.sums[name] = tensor_sum(self.tensors[name])
                else:
                    self.sums[name] = wrapped(self.sums[name] + change.moved)
        self.checksum = model_checksum(self.sums, self.tensors)
        self._summed = self.version

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
        values, former = new[indices], old[indices]
        old[indices] = values
        moved = element_sum(indices, values) - element_sum(indices, former)
        return Change(indices.cpu(), values.view(before.dtype).cpu(), moved)
