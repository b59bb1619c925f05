"""Plans which samples a pass computes: shares a forest out in several ways, and takes the cheapest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from trainer.packing._balancing import order_for_processes, share_out, step_cost
from trainer.packing._cost import PassCost
from trainer.packing._filling import fill_to_common_cost
from trainer.packing._sorting import SortedSamples
from trainer.packing._units import Unit, cut, cut_evenly, join, make_unit, split_in_two

_WORTH_ANOTHER_PLAN = 0.99
"""Take a later plan only if the step's cost drops at least to this share."""


def plans(
    batch: SortedSamples, *, budget: int, processes: int, cost: PassCost, lock_step: bool
) -> dict[str, list[Unit]]:
    """Plan a step in several ways; each plan is in the order in which processes take micro-batches.

    Args:
        batch: The step's samples.
        budget: Token budget of a micro-batch.
        processes: How many compute the step together.
        cost: To estimate passes.
        lock_step: They wait for each other in every micro-batch.

    Returns:
        By name. `whole groups`: groups spread evenly, split where that makes the step cheaper. `pieces`: the
        sorted sequences cut into even pieces, for groups that share much with each other, such as a long
        system prompt. `cut groups`, if there are several processes: micro-batches filled to a common cost,
        for groups that are few or unequal.
    """

    def joined(shares: Iterable[list[Unit]]) -> list[Unit]:
        return [join(batch, share, cost) for share in shares]

    def ordered(units: list[Unit]) -> list[Unit]:
        order = order_for_processes([unit.cost for unit in units], processes, lock_step=lock_step)
        return [units[index] for index in order]

    def equally_many(units: list[Unit]) -> list[Unit]:
        while len(units) % processes and (divisible := [unit for unit in units if len(unit.chosen) > 1]):
            costliest = max(divisible, key=lambda unit: unit.cost)
            units = [unit for unit in units if unit is not costliest]
            units += split_in_two(batch, costliest, cost)
        return units

    groups = _groups(batch, cost)
    fitting = [part for unit in groups for part in cut(batch, unit, budget, cost)]
    spread = share_out(
        fitting, split=lambda unit: split_in_two(batch, unit, cost), most_tokens=budget, processes=processes
    )
    everything = make_unit(batch, np.arange(len(batch.samples)), cost)
    pieces = cut_evenly(batch, everything, most_tokens=budget, multiple_of=processes, cost=cost)
    result = {"whole groups": ordered(joined(spread)), "pieces": ordered(pieces)}
    if processes > 1:
        rounds = -(-everything.tokens // (budget * processes))
        filled = [
            fill_to_common_cost(batch, groups, count=count * processes, most_tokens=budget, cost=cost)
            for count in (rounds, rounds + 1)
        ]
        attempts = [ordered(equally_many(joined(shares))) for shares in filled if shares is not None]
        if attempts:
            result["cut groups"] = min(attempts, key=lambda plan: _cost(plan, processes, lock_step))
    return result


def choose_plan(found: Mapping[str, list[Unit]], processes: int, *, lock_step: bool) -> list[Unit]:
    """The plan under which a step costs least; an earlier one unless a later one is clearly cheaper."""
    best, *others = found.values()
    for plan in others:
        if _cost(plan, processes, lock_step) < _WORTH_ANOTHER_PLAN * _cost(best, processes, lock_step):
            best = plan
    return best


def _cost(plan: list[Unit], processes: int, lock_step: bool) -> float:
    return step_cost([unit.cost for unit in plan], processes, lock_step=lock_step)


def _groups(batch: SortedSamples, cost: PassCost) -> list[Unit]:
    """The trees of a step: its groups, or its sequences where nothing is shared."""
    if not batch.shared.any():
        return [make_unit(batch, np.array([index]), cost) for index in range(len(batch.samples))]
    members: dict[int, list[int]] = {}
    for index, sample in enumerate(batch.samples):
        members.setdefault(sample.group_index, []).append(index)
    return [make_unit(batch, np.array(chosen), cost) for chosen in members.values()]
