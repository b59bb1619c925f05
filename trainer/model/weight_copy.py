"""A copy of weights that are spread over processes, sent and written while the model trains on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.model.sharding import OwnCopy
from trainer.model.weight_stream import WeightStream, WeightUnit


class WeightCopy:
    """Each process's own rows of the weights, as they are written, on the CPU.

    All processes make it at the same time, and each then reads it once, in whatever thread: process 0 gets
    the weights whole, one at a time, and the others send their rows for them. What was read is let go of.

    Args:
        stream: The weights.

    Raises:
        CheckpointError: An adapter cannot be merged.
    """

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream
        self._copied: deque[tuple[WeightUnit, dict[str, OwnCopy]]] = deque()
        if not stream.spread.sends_to(0):
            return
        with torch.no_grad():
            for unit, sources in stream.pieces():
                self._copied.append((unit, {name: stream.spread.copy_own(each) for name, each in sources}))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights with their names, whole, on process 0; on the others send their rows."""
        spread = self._stream.spread
        while self._copied:
            unit, copies = self._copied.popleft()
            tensors = {}
            while copies:
                name = next(iter(copies))
                whole = spread.whole_of_copies(copies.pop(name))
                if whole is not None:
                    tensors[name] = whole
                del whole
            made = self._stream.complete(unit, tensors) if tensors else []
            del tensors  # before the next ones are gathered
            while made:
                name, tensor = made.pop()
                yield name, tensor
                del tensor

    def finish(self) -> None:
        """Take part in what is left, for whatever use."""
        for _ in self.weights():
            pass
