"""Packing changes which tokens are computed together, never the result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.models import make_sample, random_tree_samples, tiny_model
from trainer.logprobs import token_logprobs
from trainer.packing import MicroBatch, Packing, pack
from trainer.samples import Sample


def gradients_alone(architecture: str, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The reference: each sequence by itself, plain forward, plain log-softmax, no packing code at all."""
    model = tiny_model(architecture)
    for sample in samples:
        logits = model(sample.tokens[None]).logits[0]
        logprobs = (logits[:-1] / sample.temperature).log_softmax(-1)
        chosen = logprobs.gather(1, sample.tokens[1:, None])[:, 0]
        (-(chosen * sample.advantages[1:] * sample.loss_mask[1:]).sum() / 7.0).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def gradients_packed(
    architecture: str, samples: list[Sample], packing: Packing, budget: int, attention: str = "sdpa"
) -> dict[str, torch.Tensor]:
    model = tiny_model(architecture, attention=attention)
    for batch in pack(samples, [7.0] * len(samples), packing=packing, tokens_per_micro_batch=budget):
        scores = token_logprobs(model, batch, use_temperature=True)
        (-(scores.logprobs * batch.advantages * batch.loss_mask / batch.denominator).sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_relative_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    scale = max(float(value.abs().max()) for value in reference.values())
    return max(float((ours[name] - value).abs().max()) for name, value in reference.items()) / scale


# Relative, in float64. transformers computes rotary angles in float32 whatever the model's type, and their
# last bit depends on the column they stand in (vectorised against scalar code), so rotary models are
# compared a little less strictly than those with learned positions.
TOLERANCE = {"gpt2": 1e-12, "llama": 1e-6, "qwen2": 1e-6}


@pytest.mark.parametrize("packing", ["prefix_tree", "padded"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("budget", [1, 45, 100_000])
def test_gradients_equal_those_of_each_sequence_alone(
    architecture: str, packing: Packing, budget: int
) -> None:
    samples = [sample for sample in random_tree_samples(3) if sample.trained_tokens]
    reference = gradients_alone(architecture, samples)
    ours = gradients_packed(architecture, samples, packing, budget)
    assert largest_relative_difference(ours, reference) < TOLERANCE[architecture]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    budget=st.integers(1, 200),
    packing=st.sampled_from(["prefix_tree", "padded"]),
)
def test_gradients_do_not_depend_on_the_token_budget(seed: int, budget: int, packing: Packing) -> None:
    samples = [sample for sample in random_tree_samples(seed) if sample.trained_tokens]
    if not samples:
        return
    whole = gradients_packed("gpt2", samples, "padded", 1)
    split = gradients_packed("gpt2", samples, packing, budget)
    assert largest_relative_difference(split, whole) < TOLERANCE["gpt2"]


def test_prefix_tree_works_with_eager_attention() -> None:
    samples = [sample for sample in random_tree_samples(3) if sample.trained_tokens]
    reference = gradients_alone("llama", samples)
    ours = gradients_packed("llama", samples, "prefix_tree", 10_000, attention="eager")
    assert largest_relative_difference(ours, reference) < TOLERANCE["llama"]


def test_a_shared_prompt_is_computed_once() -> None:
    prompt = list(range(10, 30))
    samples = [make_sample([*prompt, 40 + index, 50, 51], len(prompt)) for index in range(8)]
    (batch,) = pack(samples, [1.0] * 8, packing="prefix_tree", tokens_per_micro_batch=1000)
    assert batch.computed_tokens == 20 + 8 * 3
    assert batch.sequence_tokens == 8 * 23
    assert len(batch.targets) == 8 * 3


def test_the_token_after_a_branch_point_is_supervised_for_every_branch() -> None:
    samples = [make_sample([5, 6, 7], 2), make_sample([5, 6, 8], 2)]
    (batch,) = pack(samples, [1.0, 1.0], packing="prefix_tree", tokens_per_micro_batch=100)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8]]
    assert batch.predict_column.tolist() == [1, 1]
    assert batch.targets.tolist() == [7, 8]


def test_equal_sequences_share_all_their_tokens_and_count_twice() -> None:
    samples = [make_sample([5, 6, 7], 1), make_sample([5, 6, 7], 1)]
    (batch,) = pack(samples, [1.0, 1.0], packing="prefix_tree", tokens_per_micro_batch=100)
    assert batch.computed_tokens == 3
    assert batch.targets.tolist() == [6, 7, 6, 7]


def test_each_token_attends_to_its_own_ancestors_only() -> None:
    samples = [make_sample([1, 2, 3], 1), make_sample([1, 2, 4, 5], 1), make_sample([1, 9], 1)]
    (batch,) = pack(samples, [1.0] * 3, packing="prefix_tree", tokens_per_micro_batch=100)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 1]]
    attends = [row.nonzero()[:, 0].tolist() for row in batch.attention_mask[0, 0]]
    assert attends == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 5]]


def all_trained(batches: list[MicroBatch]) -> list[tuple[int, float]]:
    return sorted(
        (int(target), round(float(advantage), 6))
        for batch in batches
        for target, advantage in zip(batch.targets, batch.advantages, strict=True)
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    budget=st.integers(1, 200),
    packing=st.sampled_from(["prefix_tree", "padded"]),
)
def test_no_trained_token_is_lost_or_doubled_and_the_budget_holds(
    seed: int, budget: int, packing: Packing
) -> None:
    samples = random_tree_samples(seed)
    batches = pack(samples, [1.0] * len(samples), packing=packing, tokens_per_micro_batch=budget)
    expected = sorted(
        (int(sample.tokens[t]), round(float(sample.advantages[t]), 6))
        for sample in samples
        for t in sample.loss_mask.nonzero()[:, 0].tolist()
    )
    assert all_trained(batches) == expected
    longest = max(len(sample.tokens) for sample in samples)
    assert all(batch.computed_tokens <= max(budget, longest) for batch in batches)


def test_weightless_micro_batches_give_zero_gradients() -> None:
    model = tiny_model("llama")
    (batch,) = pack([make_sample([5, 6, 7], 1)], [1.0], packing="prefix_tree", tokens_per_micro_batch=100)
    empty = batch.without_weight()
    scores = token_logprobs(model, empty, use_temperature=False)
    (scores.logprobs * empty.loss_mask).sum().backward()
    assert all(float(parameter.grad.abs().sum()) == 0.0 for parameter in model.parameters())
