"""Pure functions on the bits of tensors: what differs, packed places, and sums that prove what is held.

`inference_plugins/atropos_delta.py` has the other half, which unpacks and sums in the server. On the CPU they
compute by numpy: torch's threads wait for each other at each operation, and where they share their cores with
a server's, ten times as long as they compute.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.model.base_checkpoint import StoredTensor

NumpyArray = NDArray[np.int64]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 15
"""Numbers that are hashed at once on the CPU: they stay in its cache."""
_COMPARED = 1 << 19
"""Numbers that a thread compares at once."""
_GAP_TYPES = (np.uint8, np.uint16)
_MOST = 127
"""By how much bits move at most that travel as one byte."""


def bits(tensor: Tensor) -> Tensor:
    """View numbers as integers of their size, so that NaN equals itself and 0 does not equal -0."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def pack_indices(indices: Tensor) -> Tensor:
    """Pack ascending indices [N], int64, as the numbers of unchanged places before each.

    The largest number that the type holds stands for as many unchanged places and no changed one. The type is
    the one that takes fewer bytes: uint8, or uint16 as int16 with the same bits.
    """
    gaps = gaps_between(indices, -1)
    layout = packed_layout(len(gaps), escapes(gaps))
    dtype = np.uint8 if layout.dtype is torch.uint8 else np.uint16
    more = np.iinfo(dtype).max
    wide = np.flatnonzero(gaps >= more)
    times, gaps[wide] = np.divmod(gaps[wide], more)
    packed = np.insert(gaps.astype(dtype), np.repeat(wide, times), more)
    return torch.from_numpy(packed).view(layout.dtype)


def unpack_indices(packed: Tensor) -> Tensor:
    """Return the indices [N], int64, that `pack_indices` has packed."""
    narrow = packed.numpy() if packed.dtype is torch.uint8 else packed.view(torch.uint16).numpy()
    ends = narrow != np.iinfo(narrow.dtype).max
    return torch.from_numpy(np.cumsum(narrow + ends, dtype=np.int64)[ends] - 1)


def gaps_between(indices: Tensor, before: int) -> NumpyArray:
    """Return how many places lie between ascending indices [N]; before the first one, from `before` on."""
    return np.diff(indices.numpy(), prepend=before) - 1


def escapes(gaps: NumpyArray) -> list[int]:
    """Return how many numbers more than gaps are packed, for each type that they may have."""
    mores = [np.iinfo(dtype).max for dtype in _GAP_TYPES]
    return [int((gaps[gaps >= more] // more).sum()) for more in mores]


def packed_layout(count: int, escaped: Sequence[int]) -> StoredTensor:
    """Return the type and the size of packed places.

    Args:
        count: Number of places.
        escaped: See `escapes`.
    """
    sizes = [count + each for each in escaped]
    narrow = sizes[0] <= 2 * sizes[1]
    return StoredTensor(torch.uint8, (sizes[0],)) if narrow else StoredTensor(torch.int16, (sizes[1],))


def differences(old: Tensor, new: Tensor, *, at_most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find where the flat bits [N] of two tensors on one device differ.

    Returns:
        The places, ascending, int64, and the bits there, old and new. None: there are more than `at_most`.
    """
    if old.device.type != "cpu":
        different = old != new
        if int(torch.count_nonzero(different)) > at_most:
            return None
        places = different.nonzero().squeeze(1)
        return places, old[places], new[places]
    held, given = old.numpy(), new.numpy()

    def find(first: int) -> tuple[Any, Any, Any]:
        part, other = held[first : first + _COMPARED], given[first : first + _COMPARED]
        there = np.flatnonzero(part != other)
        return there + first, part[there], other[there]

    starts = range(0, max(1, len(old)), _COMPARED)
    found, count = [], 0
    # One piece is compared sooner than a thread wakes up.
    for piece in map(find, starts) if len(starts) == 1 else _threads().map(find, starts):
        count += len(piece[0])
        if count > at_most:  # the rest is not looked at
            return None
        found.append(piece)
    places, former, values = (torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True))
    return places, former, values


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
    return torch.from_numpy(moves), values[torch.from_numpy(~near)]


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
    places, values = indices.numpy(), numbers.numpy()
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
