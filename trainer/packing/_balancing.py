"""Sharing units out among micro-batches, and micro-batches among processes, by what they cost.

Processes wait for the slowest: at the end of a step, so that the costliest process is what counts, or, where
weights are sharded, in every layer ("lock step"), so that the costliest micro-batch of each round is. Nothing
here is random and ties are broken by position: equal steps are shared out equally.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from trainer.packing._units import Unit

Split = Callable[[Unit], list[Unit]]

_WORTH_A_SPLIT = 0.98
"""Split only if the slowest process's cost drops at least to this share: a split computes a prefix twice."""


def share_out(units: Sequence[Unit], *, split: Split, most_tokens: int, processes: int) -> list[list[Unit]]:
    """Group units into micro-batches of at most `most_tokens`, of about equal cost.

    There are as many as the smallest multiple of `processes` that fits, fewer only if there are not so
    many units. Where it makes the costliest cheaper, units are split.

    Args:
        units: At least one; a unit beyond the budget gets a micro-batch of its own.
        split: Cuts a unit in two; returns it alone if it cannot be cut.
        most_tokens: Token budget of a micro-batch.
        processes: Number of processes that compute the step together.
    """
    units = list(units)
    shares = _fitting_shares(units, most_tokens, processes)
    while processes > 1:
        costliest = max(shares, key=_cost)
        whole, halves = _first_split(costliest, split)
        if whole is None:
            break
        attempt = [unit for unit in units if unit is not whole] + halves
        better = _fitting_shares(attempt, most_tokens, processes)
        if len(better) > max(len(shares), processes):
            break
        if max(map(_cost, better)) > _WORTH_A_SPLIT * _cost(costliest):
            break
        units, shares = attempt, better
    return shares


def order_for_processes(costs: Sequence[float], processes: int, *, lock_step: bool = False) -> list[int]:
    """Order micro-batches such that process r takes those at r, r + processes, r + 2 * processes...

    Costliest first, each to the cheapest process so far that may have one more. In lock step simply to the
    next process: those that are computed together cost about the same.

    Args:
        costs: One a micro-batch.
        processes: Number of processes.
        lock_step: Processes wait for each other in every micro-batch.

    Returns:
        The positions of the micro-batches in their new order.
    """
    costliest_first = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    if lock_step:
        return costliest_first
    rounds = -(-len(costs) // processes)
    full = len(costs) - (rounds - 1) * processes  # so many processes have a micro-batch in the last round
    taken: list[list[int]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for position in costliest_first:
        most = rounds if full else rounds - 1
        may = [rank for rank in range(processes) if len(taken[rank]) < most]
        rank = min(may, key=lambda rank: (load[rank], rank))
        taken[rank].append(position)
        load[rank] += costs[position]
        full -= len(taken[rank]) == rounds
    taken.sort(key=len, reverse=True)
    return [mine[turn] for turn in range(rounds) for mine in taken if turn < len(mine)]


def process_costs(costs: Sequence[float], processes: int) -> list[float]:
    """Cost of each process's share of micro-batches so ordered."""
    return [sum(costs[rank::processes]) for rank in range(processes)]


def step_cost(costs: Sequence[float], processes: int, *, lock_step: bool = False) -> float:
    """Cost of a step of micro-batches so ordered for the slowest process, its waiting for others included."""
    if lock_step:
        return sum(max(costs[first : first + processes]) for first in range(0, len(costs), processes))
    return max(process_costs(costs, processes))


def imbalance(costs: Sequence[float], processes: int, *, lock_step: bool = False) -> float:
    """`step_cost` over the mean of all processes; 1 is even."""
    mean = sum(process_costs(costs, processes)) / processes
    return step_cost(costs, processes, lock_step=lock_step) / mean


def _first_split(units: Sequence[Unit], split: Split) -> tuple[Unit | None, list[Unit]]:
    """The costliest of `units` that can be split, and its halves."""
    for unit in sorted(units, key=lambda unit: -unit.cost):
        halves = split(unit)
        if len(halves) > 1:
            return unit, halves
    return None, []


def _cost(units: Sequence[Unit]) -> float:
    return sum(unit.cost for unit in units)


def _fitting_shares(units: Sequence[Unit], most_tokens: int, processes: int) -> list[list[Unit]]:
    total = sum(unit.tokens for unit in units)
    count = processes * max(1, -(-total // (most_tokens * processes)))
    tight: list[list[Unit]] = []
    while (shares := _longest_first(units, count, most_tokens)) is None:
        tight = tight or _first_fit(units, most_tokens)
        if len(tight) <= count:
            return tight
        count += processes
    return [share for share in shares if share]


def _longest_first(units: Sequence[Unit], count: int, most_tokens: int) -> list[list[Unit]] | None:
    """Costliest unit first, each to the cheapest share that it fits into; None if one fits nowhere."""
    shares: list[list[Unit]] = [[] for _ in range(count)]
    tokens = [0] * count
    cheapest = [(0.0, index) for index in range(count)]  # a heap
    for unit in sorted(units, key=lambda unit: (-unit.cost, int(unit.chosen[0]))):
        too_full = []
        while cheapest and tokens[cheapest[0][1]] and tokens[cheapest[0][1]] + unit.tokens > most_tokens:
            too_full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, index = heapq.heappop(cheapest)
        shares[index].append(unit)
        tokens[index] += unit.tokens
        for entry in [*too_full, (cost + unit.cost, index)]:
            heapq.heappush(cheapest, entry)
    return shares


def _first_fit(units: Sequence[Unit], most_tokens: int) -> list[list[Unit]]:
    """Longest unit first, each to the first share that it fits into: less even, but fits more often."""
    shares: list[list[Unit]] = []
    tokens: list[int] = []
    for unit in sorted(units, key=lambda unit: (-unit.tokens, int(unit.chosen[0]))):
        index = next((at for at, used in enumerate(tokens) if used + unit.tokens <= most_tokens), None)
        if index is None:
            shares.append([unit])
            tokens.append(unit.tokens)
        else:
            shares[index].append(unit)
            tokens[index] += unit.tokens
    return shares
