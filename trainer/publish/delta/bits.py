"""Pure functions on the bits of tensors: what differs, packed places, and sums that prove what is held.

`inference_plugins/atropos_delta.py` has the other half, which unpacks and sums in the server. On the CPU they
compute by numpy: torch's threads wait for each other at each operation, and where they share their cores with
a server's, ten times as long as they compute.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.model.base_checkpoint import StoredTensor

NumpyArray = NDArray[Any]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 15
"""Numbers that are hashed at once on the CPU: they stay in its cache."""
_COMPARED = 1 << 20
"""Numbers that a thread compares at once."""
_GAP_TYPES = (np.uint8, np.uint16)
_MOST = 127
"""By how much bits move at most that travel as one byte."""


def bits(tensor: Tensor) -> Tensor:
    """View numbers as integers of their size, so that NaN equals itself and 0 does not equal -0."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


@dataclass(frozen=True, kw_only=True)
class Change:
    """What differs between the bits of two tensors, at one place at least, packed to travel."""

    first: int
    """The first place, in the whole flat tensor."""
    last: int
    between: NumpyArray
    """Unchanged places between each and the next [N - 1], in the narrowest type that `narrowed` knows."""
    moves: Tensor
    """By how much the bits have moved [N] (`pack_moves`)."""
    far: Tensor
    """The bits that moved far [K]."""
    moved_sum: int
    """By how much the tensor's sum has moved."""

    @property
    def count(self) -> int:
        """At how many places."""
        return len(self.moves)

    @property
    def gaps(self) -> NumpyArray:
        """Unchanged places before each [N]."""
        return np.concatenate([narrowed(np.array([self.first])), self.between])


def joined(changes: Sequence[Change]) -> Change:
    """Put together what changed in one part of a tensor after the other."""
    if len(changes) == 1:
        return changes[0]
    between = [changes[0].between]
    for former, change in pairwise(changes):
        between += [narrowed(np.array([change.first - former.last - 1])), change.between]
    return Change(
        first=changes[0].first,
        last=changes[-1].last,
        between=np.concatenate(between),
        moves=torch.cat([change.moves for change in changes]),
        far=torch.cat([change.far for change in changes]),
        moved_sum=wrapped(sum(change.moved_sum for change in changes)),
    )


def narrowed(gaps: NumpyArray) -> NumpyArray:
    """Return the same numbers of at least 0 in the narrowest type in which they need no escape."""
    most = int(gaps.max(initial=0))
    fits = (dtype for dtype in _GAP_TYPES if most < np.iinfo(dtype).max)
    return gaps.astype(next(fits, np.int64), copy=False)


def pack_gaps(gaps: NumpyArray) -> Tensor:
    """Pack the numbers of unchanged places before each changed one [N].

    The largest number that the type holds stands for as many unchanged places and no changed one. The type is
    the one that takes fewer bytes: uint8, or uint16 as int16 with the same bits.
    """
    layout = packed_layout(len(gaps), escapes(gaps))
    dtype = np.uint8 if layout.dtype is torch.uint8 else np.uint16
    more = np.iinfo(dtype).max
    wide = np.flatnonzero(gaps >= more)
    if len(wide):
        gaps = gaps.astype(np.int64)
        times, gaps[wide] = np.divmod(gaps[wide], more)
        gaps = np.insert(gaps.astype(dtype), np.repeat(wide, times), more)
    return torch.from_numpy(gaps.astype(dtype, copy=False)).view(layout.dtype)


def unpack_indices(packed: Tensor) -> Tensor:
    """Return the indices [N], int64, that `pack_gaps` has packed."""
    narrow = packed.numpy() if packed.dtype is torch.uint8 else packed.view(torch.uint16).numpy()
    ends = narrow != np.iinfo(narrow.dtype).max
    return torch.from_numpy(np.cumsum(narrow + ends, dtype=np.int64)[ends] - 1)


def escapes(gaps: NumpyArray) -> list[int]:
    """Return how many numbers more than gaps are packed, for each type that they may have."""
    mores = [np.iinfo(dtype).max for dtype in _GAP_TYPES]
    return [int((gaps[gaps >= more].astype(np.int64) // more).sum()) for more in mores]


def packed_layout(count: int, escaped: Sequence[int]) -> StoredTensor:
    """Return the type and the size of packed places.

    Args:
        count: Number of places.
        escaped: See `escapes`.
    """
    sizes = [count + each for each in escaped]
    narrow = sizes[0] <= 2 * sizes[1]
    return StoredTensor(torch.uint8, (sizes[0],)) if narrow else StoredTensor(torch.int16, (sizes[1],))


def begin_comparison(
    old: Tensor, new: Tensor, *, start: int = 0, at_most: int
) -> Callable[[], list[Change] | None]:
    """Begin to compare the flat bits [N] of two tensors on one device: on the CPU in a few threads.

    Args:
        old: Bits.
        new: Bits, which stay as they are until the end.
        start: Place of the first of them in the whole tensor.
        at_most: At how many places they may differ.

    Returns:
        A function that waits for the end, and returns what differs in one part of the tensor after the other.
        None: at more than `at_most` places.
    """
    if old.device.type != "cpu":
        compared = compare_by_torch(old, new, start=start, at_most=at_most)
        return lambda: compared
    arrays = [old.numpy(), new.numpy()]

    def find(first: int, *, pack_many: bool = False) -> Change | int:
        """Return what differs in a piece; of more than its share of `at_most` only how much."""
        part, other = (array[first : first + _COMPARED] for array in arrays)
        different = part != other
        count = int(np.count_nonzero(different))
        if not count or (count * len(old) > at_most * len(part) and not pack_many):
            return count
        places = np.flatnonzero(different)
        return _change(places, part[places], other[places], start + first)

    firsts = range(0, len(old), _COMPARED)
    pieces = [_threads().submit(find, first) for first in firsts]

    def wait() -> list[Change] | None:
        found = [piece.result() for piece in pieces]
        count = sum(each if isinstance(each, int) else each.count for each in found)
        changes: list[Change] = []
        for first, each in zip(firsts, found, strict=True):
            if each and count <= at_most:
                change = find(first, pack_many=True) if isinstance(each, int) else each
                changes += [change] if isinstance(change, Change) else []
        arrays.clear()  # threads may keep hold of `find` for a moment
        return changes if count <= at_most else None

    return wait


def _change(places: NumpyArray, former: Any, values: Any, start: int) -> Change:
    between = narrowed(np.diff(places) - 1)
    places += start
    moved = _sum(places, values) - _sum(places, former)
    moves, far = pack_moves(torch.from_numpy(former), torch.from_numpy(values))
    return Change(
        first=int(places[0]),
        last=int(places[-1]),
        between=between,
        moves=moves,
        far=far,
        moved_sum=wrapped(moved),
    )


def compare_by_torch(old: Tensor, new: Tensor, *, start: int, at_most: int) -> list[Change] | None:
    """Return what `begin_comparison` finds, packed on an accelerator: little has to be copied from it."""
    different = old != new
    count = int(torch.count_nonzero(different))
    if count == 0 or count > at_most:
        return None if count else []
    places = different.nonzero().squeeze(1)
    former, values = old[places], new[places]
    between = places.diff() - 1
    most = int(between.max()) if count > 1 else 0
    if most < np.iinfo(np.uint16).max:
        between = between.to(torch.uint8 if most < np.iinfo(np.uint8).max else torch.int16)
    gaps = between.cpu().numpy()
    places += start
    moved = _mixed_sum(places, values) - _mixed_sum(places, former)
    added = values - former
    added = added.view(torch.int8) if added.dtype is torch.uint8 else added
    near = (added >= -_MOST) & (added <= _MOST)
    moves = torch.where(near, added, -_MOST - 1).to(torch.int8)
    return [
        Change(
            first=int(places[0]),
            last=int(places[-1]),
            between=gaps.view(np.uint16) if gaps.dtype == np.int16 else gaps,
            moves=moves.cpu(),
            far=values[~near].cpu(),
            moved_sum=wrapped(moved),
        )
    ]


@cache
def _threads() -> ThreadPoolExecutor:
    """As many as torch computes with."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="compare")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay with the parent


def pack_moves(former: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Pack bits [N] as what was added to the former ones: mostly 1 or -1, the next number of the type.

    Returns:
        int8 [N], of which -128 stands for more than 127 up or down; and the bits at these places [K].
    """
    added = (values.numpy() - former.numpy()).view(f"i{values.itemsize}")
    near = (added >= -_MOST) & (added <= _MOST)
    moves = np.where(near, added, -_MOST - 1).astype(np.int8)
    far = values.numpy()[~near]
    return torch.from_numpy(moves), torch.from_numpy(far) if len(far) else values[:0]


def add_moves(former: Tensor, moves: Tensor, far: Tensor) -> Tensor:
    """Return the bits [N] that `pack_moves` has packed.

    Raises:
        ValueError: They do not belong together.
    """
    values = former.numpy() + moves.numpy().astype(former.numpy().dtype)
    values[moves.numpy() == -_MOST - 1] = far.numpy()
    return torch.from_numpy(values)


def element_sum(indices: Tensor, numbers: Tensor) -> int:
    """Sum a hash of each number's place and bits, modulo 2^64: order and division do not matter.

    So a sum follows from the one before and what changed, and workers that hold parts can add theirs. It
    finds accidents; it is not cryptographic.

    Args:
        indices: Places in the flat tensor [N], int64.
        numbers: Bits as integers [N].
    """
    if indices.device.type != "cpu":
        return _mixed_sum(indices, numbers)
    return _sum(indices.numpy(), numbers.numpy())


def _sum(places: Any, values: Any) -> int:
    pieces = range(0, len(places), _PIECE)
    return wrapped(
        sum(_mixed_sum(places[first : first + _PIECE], values[first : first + _PIECE]) for first in pieces)
    )


def _mixed_sum(places: Any, values: Any) -> int:
    mixed = places * -7046029254386353131
    mixed += values
    mixed ^= mixed >> 32
    mixed *= -4658895280553007687
    mixed ^= mixed >> 29
    return wrapped(int(mixed.sum()))


def tensor_sum(tensor: Tensor, start: int = 0) -> int:
    """Return `element_sum` of a contiguous tensor, whose first number has the place `start`."""
    flat = bits(tensor.reshape(-1))
    piece = _PIECE if flat.device.type == "cpu" else max(1, len(flat))
    total = 0
    for first in range(0, len(flat), piece):
        part = flat[first : first + piece]
        total += element_sum(start + torch.arange(first, first + len(part), device=flat.device), part)
    return wrapped(total)


def wrapped(number: int) -> int:
    """Return a number modulo 2^64, as a signed integer of 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def model_checksum(sums: Mapping[str, int], tensors: Mapping[str, StoredTensor]) -> str:
    """Return a checksum of a whole model's bits: SHA-256 of its tensors' names, types, shapes and sums."""
    lines = (
        f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {sums[name]}" for name in sorted(sums)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
