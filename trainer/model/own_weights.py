"""What one process holds of weights that are spread over several, as they travel; nothing is put together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.model.weight_stream import WeightStream, WeightUnit


class OwnWeights:
    """This process's part of each weight: some rows; of experts that are one tensor in memory, whole weights.

    Each process has all weights of the stream, in its order, though of some no rows; one that has a second
    copy of the model has none.

    Args:
        stream: The weights.
    """

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream
        self._entries = {entry.name: entry for entry in stream.entries()}

    def starts(self) -> dict[str, int]:
        """Return the place of each part's first number in the whole weight, flat; 0 where it is left out."""
        result: dict[str, int] = {}
        for unit, tensor in self._stream.live():
            if tensor.ndim and not unit.converted:
                first, _ = self._stream.spread.own_rows(tensor)
                result |= dict.fromkeys(unit.shapes, first * tensor.shape[1:].numel())
        return result

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this process's parts, contiguous, on the model's device; none is kept.

        What another layout than the checkpoint's is put together for is a collective: all processes of the
        copy go through it at the same time.

        Raises:
            CheckpointError: See `WeightStream.weights`.
        """
        spread = self._stream.spread
        if not spread.sharded:
            yield from self._stream.weights()
            return
        if not spread.sends_to(0):
            return
        for number, (unit, sources) in enumerate(self._stream.pieces()):
            if unit.converted:
                yield from self._converted(unit, sources, number % spread.parts)
                continue
            for _, tensor in sources:
                own = spread.own_part(tensor)
                for name in unit.shapes:
                    yield name, own.to(self._entries[name].dtype).contiguous()
                del own, tensor

    def _converted(
        self, unit: WeightUnit, sources: Iterator[tuple[str, Tensor]], owner: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Give the unit's weights to one process, whole."""
        tensors = {}
        for name, tensor in sources:
            whole = self._stream.spread.whole_on(tensor, owner)
            if whole is not None:
                tensors[name] = whole
        made = dict(self._stream.complete(unit, tensors)) if tensors else {}
        del tensors
        for name, shape in unit.shapes.items():
            nothing = torch.empty((0, *shape[1:]), dtype=self._entries[name].dtype)
            yield name, made.pop(name, nothing)
