"""Random numbers that depend on nothing but a sequence's seed and its position.

A counter-based generator (SplitMix64: Steele, Lea and Flood, 2014) instead of a stateful one: a sequence
draws the same numbers whatever else runs in the batch, and after it was interrupted and computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FIRST = 0xBF58_476D_1CE4_E5B9
_SECOND = 0x94D0_49BB_1331_11EB


def derive_seed(*parts: int) -> int:
    """Mix integers of any size and sign into one 64-bit seed; the order matters."""
    state = 0
    for part in parts:
        state = _mix((state + _GOLDEN) & _MASK ^ (part & _MASK))
    return state


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Draw one number in [0, 1) for each pair of seed and position. [N]."""
    state = np.asarray(seeds, dtype=np.uint64)
    steps = np.asarray(positions, dtype=np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        state = state + steps * np.uint64(_GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)
