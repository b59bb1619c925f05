"""A step's samples become its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.packing._arrays import Integers
from trainer.packing._balancing import order_for_processes, process_costs, share_out
from trainer.packing._cost import PassCost
from trainer.packing._micro_batch import MicroBatch, Packing
from trainer.packing._padded import pad, padded_cost
from trainer.packing._sorting import SortedSamples, sort_samples
from trainer.packing._tree import fold
from trainer.packing._units import Unit, cut, cut_evenly, join, make_unit, split_in_two
from trainer.samples.sample import Sample

_PROPORTIONS_OF_A_SMALL_MODEL = PassCost(per_token=6.0, per_pair=0.01)


def pack(
    samples: Sequence[Sample],
    denominators: Sequence[float],
    *,
    packing: Packing,
    tokens_per_micro_batch: int,
    processes: int = 1,
    cost: PassCost = _PROPORTIONS_OF_A_SMALL_MODEL,
) -> list[MicroBatch]:
    """Group samples into micro-batches of at most `tokens_per_micro_batch` computed tokens.

    A single sequence longer than that gets a micro-batch of its own. Groups stay whole where they can: what
    their sequences share is computed once a micro-batch. The order is fixed by the samples' tokens, so equal
    steps are packed equally.

    Args:
        samples: At least one, on the CPU.
        denominators: One a sample: what the loss of each of its tokens is divided by.
        packing: See the package.
        tokens_per_micro_batch: Token budget, > 0.
        processes: How many processes compute the step together.
        cost: To estimate what a micro-batch costs.

    Returns:
        Micro-batches in the order in which processes take them: process r computes those at r,
        r + processes, r + 2 * processes... A number that is no multiple of `processes` means that there were
        not enough sequences.
    """
    batch = sort_samples(samples, denominators, share=packing == "prefix_tree")
    if packing == "padded":
        rectangles = _rectangles(batch, tokens_per_micro_batch, processes, cost)
        costs = [padded_cost(batch, chosen, cost) for chosen in rectangles]
        order = order_for_processes(costs, processes)
        return [pad(batch, rectangles[index], cost=cost) for index in order]
    shares = _balanced(batch, tokens_per_micro_batch, processes, cost)
    return [fold(batch, unit.chosen, packing=packing, cost=cost) for unit in shares]


def _balanced(batch: SortedSamples, budget: int, processes: int, cost: PassCost) -> list[Unit]:
    """The better of two ways to share a forest out, in the order in which processes take it.

    Whole groups are spread evenly; or the sorted sequences are cut into even pieces, which is better where
    groups share much with each other, such as a long system prompt.
    """
    units = [part for unit in _groups(batch, cost) for part in cut(batch, unit, budget, cost)]
    grouped = share_out(
        units,
        split=lambda unit: split_in_two(batch, unit, cost),
        most_tokens=budget,
        processes=processes,
    )
    everything = make_unit(batch, np.arange(len(batch.samples)), cost)
    whole_groups = _ordered([join(batch, share, cost) for share in grouped], processes)
    pieces = _ordered(
        cut_evenly(batch, everything, most_tokens=budget, multiple_of=processes, cost=cost), processes
    )
    return pieces if _slowest(pieces, processes) < 0.99 * _slowest(whole_groups, processes) else whole_groups


def _ordered(units: list[Unit], processes: int) -> list[Unit]:
    return [units[index] for index in order_for_processes([unit.cost for unit in units], processes)]


def _slowest(units: list[Unit], processes: int) -> float:
    return max(process_costs([unit.cost for unit in units], processes))


def _groups(batch: SortedSamples, cost: PassCost) -> list[Unit]:
    """The trees of a step: its groups, or its sequences where nothing is shared."""
    if not batch.shared.any():
        return [make_unit(batch, np.array([index]), cost) for index in range(len(batch.samples))]
    members: dict[int, list[int]] = {}
    for index, sample in enumerate(batch.samples):
        members.setdefault(sample.group_index, []).append(index)
    return [make_unit(batch, np.array(chosen), cost) for chosen in members.values()]


def _rectangles(batch: SortedSamples, budget: int, processes: int, cost: PassCost) -> list[Integers]:
    """Cut samples, longest first, where rows times the longest row pass the budget.

    Then the costliest are halved until every process has equally many.
    """
    order = np.argsort(-batch.lengths, kind="stable")
    parts: list[Integers] = []
    first = 0
    for index in range(1, len(order) + 1):
        if index == len(order) or (index - first + 1) * int(batch.lengths[order[first]]) > budget:
            parts.append(order[first:index])
            first = index
    while len(parts) % processes and (divisible := [part for part in parts if len(part) > 1]):
        costliest = max(divisible, key=lambda part: padded_cost(batch, part, cost))
        where = next(index for index, part in enumerate(parts) if part is costliest)
        middle = len(costliest) // 2
        parts[where : where + 1] = [costliest[:middle], costliest[middle:]]
    return parts
