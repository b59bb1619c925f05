"""Samples in lexicographic order, and how much neighbours share: all that is known of a step's trees.

In this order no earlier sequence shares more with a sequence than its neighbour does, so that one number a
sequence describes every tree: the length of the prefix it shares with the one before. What any two
sequences share is the minimum over the neighbours between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.packing._arrays import Integers, as_array
from trainer.packing._trained_tokens import TrainedTokens
from trainer.samples.sample import Sample


@dataclass(frozen=True, kw_only=True)
class SortedSamples:
    """The n samples of a step in lexicographic order of their tokens; equal ones in the given order."""

    samples: list[Sample]
    tokens: list[Integers]
    lengths: Integers
    """[n] tokens."""
    trained: Integers
    """[n] tokens with a loss."""
    trained_tokens: TrainedTokens
    """The tokens with a loss, and what each is trained with."""
    shared: Integers
    """[n] tokens in common with the sample before; 0 for the first, and everywhere if nothing is shared."""

    def shared_within(self, chosen: Integers) -> Integers:
        """Tokens that each chosen sample, positions in rising order, shares with the chosen one before."""
        result = np.zeros(len(chosen), dtype=np.int64)
        if len(chosen) > 1:  # minima over (chosen[i - 1], chosen[i]]
            result[1:] = np.minimum.reduceat(self.shared[: int(chosen[-1]) + 1], chosen[:-1] + 1)
        return result


def sort_samples(samples: Sequence[Sample], denominators: Sequence[float], *, share: bool) -> SortedSamples:
    """Sort samples by their tokens.

    Args:
        samples: At least one.
        denominators: One a sample.
        share: False to count nothing as shared.
    """
    arrays = [as_array(sample.tokens) for sample in samples]
    # The bytes of big-endian integers compare as the integers do, at the speed of memcmp.
    keys = [array.astype(">u4").tobytes() for array in arrays]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    tokens = [arrays[index] for index in order]
    shared = [0, *(_shared_prefix_length(one, two) if share else 0 for one, two in pairwise(tokens))]
    in_order = [samples[index] for index in order]
    trained_tokens = TrainedTokens.of(in_order, tokens, [denominators[index] for index in order])
    return SortedSamples(
        samples=in_order,
        tokens=tokens,
        lengths=np.array([len(array) for array in tokens], dtype=np.int64),
        trained=np.diff(trained_tokens.first),
        trained_tokens=trained_tokens,
        shared=np.array(shared, dtype=np.int64),
    )


def _shared_prefix_length(first: Integers, second: Integers) -> int:
    shorter = min(len(first), len(second))
    differs = first[:shorter] != second[:shorter]
    where = int(differs.argmax())
    return where if differs[where] else shorter
