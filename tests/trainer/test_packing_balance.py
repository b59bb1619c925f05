"""Micro-batches are of about equal cost, whole groups stay together, and every process gets equally many."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from tests.trainer.models import forests, make_sample
from trainer.model.sharding import Spread
from trainer.packing import MicroBatch, Packing, PassCost, imbalance, pack
from trainer.packing._balancing import order_for_processes, process_costs
from trainer.packing._filling import fill_to_common_cost
from trainer.packing._sorting import sort_samples
from trainer.packing._units import join, make_unit
from trainer.run.metrics import packing_metrics
from trainer.samples.sample import Sample

COST = PassCost(per_token=100.0, per_pair=1.0, per_trained_token=10.0)


def group(index: int, prompt: int, completions: list[int]) -> list[Sample]:
    generator = random.Random(index)
    start = [generator.randrange(1000) for _ in range(prompt)]
    return [
        make_sample([*start, *(generator.randrange(1000) for _ in range(length))], prompt, group_index=index)
        for length in completions
    ]


def packed(
    samples: list[Sample],
    processes: int,
    budget: int,
    packing: Packing = "prefix_tree",
    *,
    lock_step: bool = False,
) -> list[MicroBatch]:
    return pack(
        samples,
        [1.0] * len(samples),
        packing=packing,
        tokens_per_micro_batch=budget,
        processes=processes,
        cost=COST,
        lock_step=lock_step,
    )


def imbalance_of(batches: list[MicroBatch], processes: int) -> float:
    return imbalance([batch.cost for batch in batches], processes)


def test_groups_of_unequal_length_are_spread_evenly() -> None:
    generator = random.Random(0)
    samples = [
        sample
        for index in range(16)
        for sample in group(index, generator.randint(10, 300), [generator.randint(10, 200)] * 4)
    ]
    for processes in (2, 4):
        batches = packed(samples, processes, 4096)
        assert len(batches) % processes == 0
        assert imbalance_of(batches, processes) < 1.05
        assert sum(batch.computed_tokens for batch in batches) < 1.1 * sum(
            batch.computed_tokens for batch in packed(samples, 1, 1 << 30)
        )


def test_whole_groups_stay_together_where_the_budget_allows_it() -> None:
    samples = [sample for index in range(6) for sample in group(index, 50, [20] * 4)]
    batches = packed(samples, 1, 2 * 130)
    assert [batch.computed_tokens for batch in batches] == [260, 260, 260]


def test_a_group_beyond_the_budget_is_cut_at_a_branch() -> None:
    samples = group(0, 50, [20] * 8)
    batches = packed(samples, 1, 130)
    assert sorted(batch.computed_tokens for batch in batches) == [130, 130]


def test_a_lone_group_is_split_for_two_processes_if_that_is_faster() -> None:
    worth_it = packed(group(0, 20, [200] * 8), 2, 10_000)
    assert len(worth_it) == 2
    assert imbalance_of(worth_it, 2) == pytest.approx(1.0, abs=0.05)
    not_worth_it = packed(group(0, 5000, [1] * 2), 2, 10_000)
    assert len(not_worth_it) == 1


def test_a_system_prompt_of_all_groups_is_computed_once_a_micro_batch() -> None:
    system = list(range(1000, 1600))
    samples = []
    for index in range(8):
        for sample in group(index, 20, [20] * 4):
            tokens = system + sample.tokens.tolist()
            samples.append(make_sample(tokens, len(system) + 20, group_index=index))
    (batch,) = packed(samples, 1, 4096)
    assert batch.computed_tokens == 600 + 8 * 100


@settings(max_examples=60, deadline=None)
@given(
    samples=forests(),
    processes=st.integers(1, 4),
    budget=st.sampled_from([1, 40, 120, 10_000]),
    packing=st.sampled_from(["prefix_tree", "plain", "padded"]),
    lock_step=st.booleans(),
)
def test_no_process_has_two_micro_batches_more_than_another_and_equal_steps_are_packed_equally(
    samples: list[Sample], processes: int, budget: int, packing: Packing, lock_step: bool
) -> None:
    batches = packed(samples, processes, budget, packing, lock_step=lock_step)
    longest = max(len(sample.tokens) for sample in samples)
    assert all(batch.computed_tokens <= max(budget, longest) for batch in batches)
    assert sum(batch.sequence_tokens for batch in batches) == sum(len(sample.tokens) for sample in samples)
    if len(batches) % processes:
        assert len(batches) <= len(samples)
    again = packed(samples, processes, budget, packing, lock_step=lock_step and processes > 1)
    assert [batch.input_ids.tolist() for batch in batches] == [batch.input_ids.tolist() for batch in again]


@given(costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=20), processes=st.integers(1, 6))
def test_micro_batches_are_ordered_such_that_no_process_is_much_slower(
    costs: list[float], processes: int
) -> None:
    order = order_for_processes(costs, processes)
    assert sorted(order) == list(range(len(costs)))
    if len(costs) % processes == 0:
        loads = process_costs([costs[index] for index in order], processes)
        assert max(loads) - min(loads) <= max(costs) + 1e-9


def test_what_counts_is_the_slowest_process_or_the_costliest_micro_batch_of_each_round() -> None:
    costs = [4.0, 1.0, 1.0, 4.0]
    assert imbalance(costs, 2) == 1.0
    assert imbalance(costs, 2, lock_step=True) == 8 / 5
    assert imbalance([costs[index] for index in order_for_processes(costs, 2, lock_step=True)], 2) == 1.0


def test_the_row_of_a_step_says_what_lock_step_costs_where_weights_are_spread() -> None:
    (batch,) = packed(group(0, 5, [10]), 1, 4096)
    batches = [replace(batch, cost=cost) for cost in (4.0, 1.0, 1.0, 4.0)]
    mesh: Any = object()
    for spread, expected in (
        (Spread(copies=2), 1.0),
        (Spread(parts=2, mesh=mesh), 8 / 5),
        (Spread(parts=2, mesh=mesh, gathered=True), 1.0),
    ):
        assert packing_metrics(batches, spread)["imbalance"] == expected


def test_in_lock_step_micro_batches_of_about_equal_cost_are_computed_together() -> None:
    lengths = (1000, 500, 400, 300, 200, 100)
    samples = [sample for index, length in enumerate(lengths) for sample in group(index, 5, [length])]
    even, together = (
        [batch.cost for batch in packed(samples, 2, 1, lock_step=lock_step)] for lock_step in (False, True)
    )
    assert imbalance(even, 2) < imbalance(together, 2)
    assert imbalance(together, 2, lock_step=True) < imbalance(even, 2, lock_step=True)


def test_a_few_unequal_groups_are_cut_where_the_next_process_begins() -> None:
    generator = random.Random(0)
    samples = [
        sample
        for index in range(16)
        for sample in group(index, 20, [generator.randint(20, 40 * (index + 1)) for _ in range(8)])
    ]
    batches = packed(samples, 16, 10_000)
    assert len(batches) == 16
    assert imbalance_of(batches, 16) < 1.05


@settings(max_examples=60, deadline=None)
@given(samples=forests(), count=st.integers(1, 4), budget=st.sampled_from([40, 120, 10_000]))
def test_filled_micro_batches_hold_each_sequence_once_and_are_in_the_budget(
    samples: list[Sample], count: int, budget: int
) -> None:
    batch = sort_samples(samples, [1.0] * len(samples), share=True)
    everything = make_unit(batch, np.arange(len(samples)), COST)
    filled = fill_to_common_cost(batch, [everything], count=count, most_tokens=budget, cost=COST)
    if filled is None:
        assert count > 1 or everything.tokens > budget
        return
    units = [join(batch, parts, COST) for parts in filled]
    assert sorted(index for unit in units for index in unit.chosen) == list(range(len(samples)))
    most = 1.5 * everything.cost / count
    for unit in units:
        assert len(unit.chosen) == 1 or (unit.tokens <= budget and unit.cost <= most * (1 + 1e-9))


def test_the_estimate_counts_the_operations_that_torch_counts() -> None:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    tokens = 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64)).logits.sum().backward()
    # Eager attention computes all pairs, visible or not. The first layer's input gradient exists, too.
    estimate = PassCost.of_config(config).of(tokens=tokens, pairs=tokens**2, trained=tokens)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_other_names_and_experts_are_understood() -> None:
    gpt2 = PassCost.of_config(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100))
    assert gpt2.per_token == 6 * 2 * (4 * 64 * 64 + 2 * 64 * 256)
    assert gpt2.per_trained_token == 6 * 64 * 100
    assert gpt2.per_pair == 12 * 2 * 64


def test_cost_and_visible_pairs_of_a_micro_batch_are_those_of_its_rule() -> None:
    (batch,) = packed(group(0, 30, [5, 17, 40]), 1, 1000)
    assert batch.subtree_end is not None
    pairs = int((batch.subtree_end - torch.arange(batch.computed_tokens)).sum())
    assert batch.cost == COST.of(tokens=batch.computed_tokens, pairs=pairs, trained=len(batch.targets))
