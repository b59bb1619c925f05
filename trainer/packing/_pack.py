"""A step's samples become its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.packing._arrays import Integers
from trainer.packing._balancing import order_for_processes
from trainer.packing._cost import PassCost
from trainer.packing._micro_batch import MicroBatch, Packing
from trainer.packing._padded import pad, padded_cost
from trainer.packing._planning import choose_plan, plans
from trainer.packing._sorting import SortedSamples, sort_samples
from trainer.packing._tree import fold
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
    lock_step: bool = False,
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
        lock_step: Processes wait for each other in every micro-batch, not only at the end of the step.

    Returns:
        Micro-batches in the order in which processes take them: process r computes those at r,
        r + processes, r + 2 * processes... A number that is no multiple of `processes` means that there were
        not enough sequences.
    """
    batch = sort_samples(samples, denominators, share=packing == "prefix_tree")
    if packing == "padded":
        rectangles = _rectangles(batch, tokens_per_micro_batch, processes, cost)
        costs = [padded_cost(batch, chosen, cost) for chosen in rectangles]
        order = order_for_processes(costs, processes, lock_step=lock_step)
        return [pad(batch, rectangles[index], cost=cost) for index in order]
    found = plans(batch, budget=tokens_per_micro_batch, processes=processes, cost=cost, lock_step=lock_step)
    plan = choose_plan(found, processes, lock_step=lock_step)
    return [fold(batch, unit.chosen, packing=packing, cost=cost) for unit in plan]


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
