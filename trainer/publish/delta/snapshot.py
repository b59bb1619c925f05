"""The bits that were published last, beside the live model, and what a new version changes in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from trainer.publish.delta.bits import Change, begin_comparison, bits, joined, tensor_sum, wrapped


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
        self._summed = False
        """Whether the sums are of the version that the tensors are."""
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

    def advance(
        self, version: int, copies: Iterable[tuple[str, Tensor]], *, ahead: int = 0
    ) -> dict[str, Change | None] | None:
        """Go on to a version.

        Args:
            version: Its number.
            copies: Of every weight, the same ones as before. They are kept, and those before let go of.
            ahead: How many more copies are asked for while one is compared, so that threads need not wait.

        Returns:
            What changed, by name; None where most did. None: this is the first version.
        """
        if not self._summed:
            self.sums = {}
        self._summed = False
        first, self.version = self.version is None, None  # until all of them are taken
        changes: dict[str, Change | None] = {}
        compared: deque[tuple[str, Callable[[], list[Change] | None]]] = deque()

        def wait_for_one() -> None:
            name, wait = compared.popleft()
            found = wait()
            if found is None:
                changes[name] = None
            elif found:
                changes[name] = joined(found)

        for name, copy in copies:
            if not first:
                compared.append((name, self._compare(name, copy)))
            self.tensors[name] = copy
            if len(compared) > ahead:
                wait_for_one()
        while compared:
            wait_for_one()
        self.version = version
        return None if first else changes

    def start(self, name: str) -> int:
        """Return the place of the first number that this process holds of a tensor."""
        return self._starts.get(name, 0)

    def sum_up(self, changes: Mapping[str, Change | None] | None) -> None:
        """Bring the sums up to this version, by what `advance` has returned. Again: nothing more."""
        if self._summed:
            return
        if changes is None or not self.sums:
            self.sums = {name: self._sum(name) for name in self.tensors}
        else:
            sums = {
                name: self._sum(name) if change is None else wrapped(self.sums[name] + change.moved_sum)
                for name, change in changes.items()
            }
            self.sums |= sums
        self._summed = True

    def _sum(self, name: str) -> int:
        return tensor_sum(self.tensors[name], self.start(name))

    def _compare(self, name: str, copy: Tensor) -> Callable[[], list[Change] | None]:
        old, new = (bits(each).reshape(-1) for each in (self.tensors[name], copy))
        # Of many changes the places take more time and memory than they save bytes: then all of it travels.
        most = old.nbytes // (old.itemsize + 1)
        return begin_comparison(old, new, start=self.start(name), at_most=most)
