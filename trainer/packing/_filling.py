"""Fills micro-batches to a common cost, and cuts groups where one is full.

Where each micro-batch holds few groups, spreading them whole is uneven, and cutting all of them computes
many prefixes twice. Here a group is cut only where the next micro-batch begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.packing._arrays import Integers
from trainer.packing._cost import PassCost
from trainer.packing._sorting import SortedSamples
from trainer.packing._units import Unit, costs_after, make_unit

_BISECTIONS = 6
_HIGHEST = 1.5
"""Costs between the mean and so many times the mean are tried."""


def fill_to_common_cost(
    batch: SortedSamples, groups: Sequence[Unit], *, count: int, most_tokens: int, cost: PassCost
) -> list[list[Unit]] | None:
    """Share groups out among micro-batches of at most the same cost, the lowest that bisection finds.

    Args:
        batch: The step's samples.
        groups: All of them, each once.
        count: Number of micro-batches; some may stay empty where sequences are beyond the budget.
        most_tokens: Token budget of a micro-batch. A sequence beyond it, or beyond the common cost, gets one
            of its own.
        cost: To estimate passes.

    Returns:
        Parts of groups by micro-batch; None if the groups do not fit in.
    """
    mean = sum(group.cost for group in groups) / count
    low, high = 1.0, _HIGHEST
    best = None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        filled = _fill(batch, groups, count, most_tokens, middle * mean, cost)
        if filled is None:
            low = middle
        else:
            best, high = filled, middle
    return best


def _fill(
    batch: SortedSamples,
    groups: Sequence[Unit],
    count: int,
    most_tokens: int,
    most_cost: float,
    cost: PassCost,
) -> list[list[Unit]] | None:
    """Costliest group first: whole into the fullest that has room for it, else in parts into the emptiest."""
    filled: list[list[Unit]] = [[] for _ in range(count)]
    room, tokens = np.full(count, most_cost), np.full(count, most_tokens)
    for group in sorted(groups, key=lambda unit: (-unit.cost, int(unit.chosen[0]))):
        rest: Unit | None = group
        while rest is not None:
            fits = (room >= rest.cost) & (tokens >= rest.tokens)
            if fits.any():
                where = int(np.where(fits, room, np.inf).argmin())
                part, rest = rest, None
            else:
                where = int(np.minimum(room / most_cost, tokens / most_tokens).argmax())
                taken = _taken_off(batch, rest.chosen, room[where], tokens[where], cost)
                if not taken.any():
                    if filled[where]:
                        return None
                    taken[batch.lengths[rest.chosen].argmax()] = True
                part = make_unit(batch, rest.chosen[taken], cost)
                rest = None if taken.all() else make_unit(batch, rest.chosen[~taken], cost)
            filled[where].append(part)
            room[where] -= part.cost
            tokens[where] -= part.tokens
    return [units for units in filled if units]


def _taken_off(
    batch: SortedSamples, chosen: Integers, room: float, tokens: int, cost: PassCost
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the chosen sequences fit in together: always the one that shares most, then the costliest."""
    shared, lengths = batch.shared_within(chosen), batch.lengths[chosen]
    taken = np.zeros(len(chosen), dtype=np.bool_)
    skipped = np.zeros_like(lengths)  # tokens of each that are in already
    rank = lengths / (lengths.max() + 1)  # among those that share equally
    while True:
        added = costs_after(batch, chosen, skipped, cost)
        fits = ~taken & (added <= room) & (lengths - skipped <= tokens)
        if not fits.any():
            return taken
        index = int(np.where(fits, skipped + rank, -1).argmax())
        taken[index] = True
        room -= added[index]
        tokens -= int(lengths[index] - skipped[index])
        skipped[: index + 1] = np.maximum(skipped[: index + 1], _minima_down(shared, lengths, index))
        skipped[index + 1 :] = np.maximum(skipped[index + 1 :], np.minimum.accumulate(shared[index + 1 :]))


def _minima_down(shared: Integers, lengths: Integers, index: int) -> Integers:
    """[index + 1] tokens that sequences 0 .. index share with that at `index`; all of its own."""
    return np.minimum.accumulate(np.append(lengths[index], shared[index:0:-1]))[::-1]
