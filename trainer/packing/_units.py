"""Samples that had better stay together, what they cost, and where they can be cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.packing._arrays import Integers
from trainer.packing._cost import PassCost, visible_pairs
from trainer.packing._sorting import SortedSamples

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Samples that are computed in the same pass."""

    chosen: Integers
    """Positions in the step's sorted samples, rising."""
    tokens: int
    """Computed tokens."""
    cost: float
    """Floating-point operations."""


def make_unit(batch: SortedSamples, chosen: Integers, cost: PassCost) -> Unit:
    """Measure the chosen samples, folded as far as they share tokens."""
    shared, lengths = batch.shared_within(chosen), batch.lengths[chosen]
    tokens = int((lengths - shared).sum())
    total = cost.of(
        tokens=tokens, pairs=visible_pairs(lengths, shared), trained=float(batch.trained[chosen].sum())
    )
    return Unit(chosen=chosen, tokens=tokens, cost=total)


def join(batch: SortedSamples, units: Sequence[Unit], cost: PassCost) -> Unit:
    """One unit of all samples of `units`, which may share tokens with one another."""
    return make_unit(batch, np.sort(np.concatenate([unit.chosen for unit in units])), cost)


def cut(batch: SortedSamples, unit: Unit, most_tokens: int, cost: PassCost) -> list[Unit]:
    """Cut a unit where its tokens pass `most_tokens`; what two parts shared is computed in both.

    A single sequence that is longer stays whole.
    """
    if unit.tokens <= most_tokens:
        return [unit]
    return [make_unit(batch, part, cost) for part in _greedy_parts(batch, unit.chosen, most_tokens)]


def cut_evenly(
    batch: SortedSamples, unit: Unit, *, most_tokens: int, multiple_of: int, cost: PassCost
) -> list[Unit]:
    """Cut a unit into equal parts within the budget, their number rounded up to a multiple if it can be."""
    needed = len(list(_greedy_parts(batch, unit.chosen, most_tokens)))
    count = -(-needed // multiple_of) * multiple_of
    low, high = max(1, unit.tokens // count), most_tokens
    while low < high:  # the smallest limit that gives no more parts
        middle = (low + high) // 2
        if len(list(_greedy_parts(batch, unit.chosen, middle))) <= count:
            high = middle
        else:
            low = middle + 1
    return [make_unit(batch, part, cost) for part in _greedy_parts(batch, unit.chosen, low)]


def split_in_two(batch: SortedSamples, unit: Unit, cost: PassCost) -> list[Unit]:
    """Cut a unit so that its costlier half is as cheap as it can be; one of a single sequence stays whole."""
    if len(unit.chosen) < 2:
        return [unit]
    shared = batch.shared_within(unit.chosen)
    added = costs_after(batch, unit.chosen, shared, cost)
    alone = costs_after(batch, unit.chosen, np.zeros_like(shared), cost)
    left = added.cumsum()[:-1]  # of a cut before sequence 1 .. n - 1
    right = alone[1:] + (added.sum() - added.cumsum())[1:]
    where = int(np.maximum(left, right).argmin()) + 1
    return [make_unit(batch, part, cost) for part in (unit.chosen[:where], unit.chosen[where:])]


def costs_after(batch: SortedSamples, chosen: Integers, skipped: Integers, cost: PassCost) -> Floats:
    """[n] cost that each chosen sequence adds where its first `skipped` tokens are computed anyway."""
    lengths = batch.lengths[chosen]
    pairs = (lengths * (lengths + 1) - skipped * (skipped + 1)) / 2
    tokens = lengths - skipped
    return cost.per_token * tokens + cost.per_pair * pairs + cost.per_trained_token * batch.trained[chosen]


def _greedy_parts(batch: SortedSamples, chosen: Integers, most_tokens: int) -> Iterator[Integers]:
    lengths, shared = batch.lengths[chosen].tolist(), batch.shared_within(chosen).tolist()
    first = used = 0
    for index, (length, prefix) in enumerate(zip(lengths, shared, strict=True)):
        new = length - prefix if index > first else length
        if index > first and used + new > most_tokens:
            yield chosen[first:index]
            first, used, new = index, 0, length
        used += new
    yield chosen[first:]
