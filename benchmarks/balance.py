"""Simulates how evenly a step is shared among 8, 64 and 256 processes: the slowest's cost over the ideal.

    python -m benchmarks.balance --json balance.json

Arithmetic on one thread, no model runs: batches of drawn lengths are planned as `trainer.packing` plans them,
with the costs of Qwen3-8B and passes of 16,384 tokens. The ideal is the cost of each distinct token once,
spread evenly: a prefix that two processes compute is waste, too.

Replicated weights: processes wait for each other once a step, and the largest sum counts. Lock step (sharded
weights): they wait in every layer, and the costliest micro-batch of each round counts. "bound" is the
costliest sequence over the ideal where that is above 1: a sequence is never cut, so no plan can be below.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from benchmarks._machine import describe, machine
from local_stack.command import positive
from trainer.packing import PassCost
from trainer.packing._arrays import Integers
from trainer.packing._balancing import step_cost
from trainer.packing._planning import choose_plan, plans
from trainer.packing._sorting import SortedSamples, sort_samples
from trainer.packing._units import make_unit
from trainer.samples.sample import Sample

VOCABULARY = 151_936
QWEN3_8B = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
MODES = {"replicated": False, "lock step": True}
SEQUENCES = 8
"""Of a group."""

Draw = np.random.Generator


def math(draw: Draw) -> list[Integers]:
    """A short prompt and one answer of up to 8k; hard problems have long answers."""
    return _answers(draw, prompt=(60, 400), median=1500, longest=8192)


def reasoning(draw: Draw) -> list[Integers]:
    """A prompt and one chain of thought, cut off at 32k."""
    return _answers(draw, prompt=(60, 800), median=7000, longest=32768)


def _answers(draw: Draw, *, prompt: tuple[int, int], median: float, longest: int) -> list[Integers]:
    start = _turn(draw, draw.integers(*prompt), trained=False)
    lengths = median * draw.lognormal(0, 0.5) * draw.lognormal(0, 0.5, SEQUENCES)
    return [_after(start, _turn(draw, length, trained=True)) for length in lengths.clip(16, longest)]


def agents(draw: Draw) -> list[Integers]:
    """A task, then calls of tools and their results, to 64k; only the task is shared."""
    start = _turn(draw, draw.integers(1500, 5000), trained=False)
    group = []
    for end in (14_000 * draw.lognormal(0, 0.8, SEQUENCES)).clip(start.shape[1] + 300, 65_536):
        sequence = start
        while sequence.shape[1] < end:
            call = _turn(draw, draw.integers(50, 600), trained=True)
            sequence = _after(sequence, call, _turn(draw, draw.integers(100, 2000), trained=False))
        group.append(sequence[:, : int(end)])
    return group


def trees(draw: Draw) -> list[Integers]:
    """A conversation that branches in two before each of three turns: eight leaves."""
    group = [_turn(draw, draw.integers(200, 2000), trained=False)]
    while len(group) < SEQUENCES:
        said = [_after(each, _turn(draw, draw.integers(100, 3000), trained=True)) for each in group * 2]
        last = len(said) == SEQUENCES
        group = [
            _after(each, _turn(draw, 0 if last else draw.integers(50, 1000), trained=False)) for each in said
        ]
    return group


def _turn(draw: Draw, length: float, *, trained: bool) -> Integers:
    """[2, length]: tokens, and 1 where they are trained on."""
    return np.stack([draw.integers(VOCABULARY, size=int(length)), np.full(int(length), trained)])


def _after(*turns: Integers) -> Integers:
    return np.concatenate(turns, axis=1)


CASES: dict[str, tuple[int, Callable[[Draw], list[Integers]]]] = {
    "math 64 x 8": (64, math),
    "reasoning to 32k, 64 x 8": (64, reasoning),
    "agents to 64k, 64 x 8": (64, agents),
    "agents to 64k, 32 x 8": (32, agents),
    "trees 64 x 8": (64, trees),
}
"""Groups of a batch, and what draws one: its sequences as [2, T], see `_turn`."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Plan every case, print a table, and return what `--json` writes."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    cost = PassCost.of_config(QWEN3_8B)
    result: dict[str, Any] = {
        "benchmark": "balance",
        "machine": machine(),
        "settings": {"model": "Qwen3-8B", "tokens": options.tokens, "batches": options.batches},
        "rows": [],
    }
    for name in options.cases:
        batches = [draw_batch(name, seed) for seed in range(options.batches)]
        for processes in options.processes:
            for mode in MODES:
                measured = measure(batches, processes, MODES[mode], options.tokens, cost)
                result["rows"].append({"case": name, "processes": processes, "mode": mode, **measured})
    console = Console(width=max(Console().width, 130))
    console.print(_table(result))
    console.print(describe(result["machine"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def draw_batch(name: str, seed: int) -> SortedSamples:
    """Draw a batch of a case. Tokens are random: what groups share, they were given."""
    groups, group = CASES[name]
    draw = np.random.default_rng([seed, *name.encode()])
    samples = [_sample(sequence, index) for index in range(groups) for sequence in group(draw)]
    return sort_samples(samples, [1.0] * len(samples), share=True)


def _sample(sequence: Integers, group: int) -> Sample:
    mask = torch.from_numpy(sequence[1]).float()
    return Sample(
        tokens=torch.from_numpy(sequence[0]),
        loss_mask=mask,
        advantages=mask,
        inference_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        score=0.0,
        env_id=0,
        group_index=group,
    )


def measure(
    batches: Sequence[SortedSamples], processes: int, lock_step: bool, tokens: int, cost: PassCost
) -> dict[str, Any]:
    """Slowest process over ideal, by each planner and as chosen: means over `batches`, and the worst."""
    ratios: dict[str, list[float]] = {}
    bounds, seconds, rounds = [], [], []
    for batch in batches:
        everything = np.arange(len(batch.samples))
        ideal = make_unit(batch, everything, cost).cost / processes
        costliest = max(make_unit(batch, everything[[index]], cost).cost for index in everything)
        bounds.append(max(1.0, costliest / ideal))
        started = time.perf_counter()
        found = plans(batch, budget=tokens, processes=processes, cost=cost, lock_step=lock_step)
        chosen = choose_plan(found, processes, lock_step=lock_step)
        seconds.append(time.perf_counter() - started)
        rounds.append(-(-len(chosen) // processes))
        for name, plan in {**found, "chosen": chosen}.items():
            slowest = step_cost([unit.cost for unit in plan], processes, lock_step=lock_step)
            ratios.setdefault(name, []).append(slowest / ideal)
    return {
        "bound": statistics.fmean(bounds),
        "planners": {name: statistics.fmean(values) for name, values in ratios.items()},
        "worst": max(ratios["chosen"]),
        "rounds": statistics.fmean(rounds),
        "seconds": statistics.fmean(seconds),
    }


def _table(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    planners = list(dict.fromkeys(name for row in rows for name in row["planners"]))
    settings = result["settings"]
    table = Table(
        title=f"Slowest process over ideal, {settings['model']}, {settings['tokens']} tokens a pass, "
        f"means of {settings['batches']} batches"
    )
    names = ("case", "processes", "mode", *planners, "worst", "bound", "rounds", "seconds")
    for name in names:
        table.add_column(name, justify="left" if name in ("case", "mode") else "right")
    for row in rows:
        numbers = [row["planners"].get(name) for name in planners] + [row["worst"], row["bound"]]
        table.add_row(
            row["case"],
            str(row["processes"]),
            row["mode"],
            *("" if number is None else f"{number:.3f}" for number in numbers),
            f"{row['rounds']:.1f}",
            f"{row['seconds']:.2f}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--processes", type=positive, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tokens", type=positive, default=16_384, help="token budget of a pass")
    parser.add_argument(
        "--batches", type=positive, default=3, help="batches of each case, by seeds 0, 1, ..."
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


if __name__ == "__main__":
    main()
