"""Packing changes which tokens are computed together, never the result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests.trainer.models import forests, make_exact, make_sample, random_tree_samples, tiny_model
from trainer.model.attention import TILED, register_backends
from trainer.model.attention.inputs import dense_mask
from trainer.model.token_logprobs import token_logprobs
from trainer.packing import MicroBatch, Packing, pack
from trainer.samples.sample import Sample

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2"]
ROW_PACKINGS: list[Packing] = ["prefix_tree", "plain"]
BACKENDS = [TILED, "sdpa", "eager"]


@pytest.fixture(autouse=True)
def _backends() -> None:
    register_backends()


def model_of(architecture: str, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    model = tiny_model(architecture, dtype=dtype, attention=attention)
    return make_exact(model) if dtype == torch.float64 else model


def gradients_alone(
    architecture: str, samples: list[Sample], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """The reference: each sequence by itself, plain forward, plain log-softmax, no packing code at all."""
    model = model_of(architecture, dtype)
    for sample in samples:
        logits = model(sample.tokens[None]).logits[0]
        logprobs = (logits[:-1] / sample.temperature).log_softmax(-1)
        chosen = logprobs.gather(1, sample.tokens[1:, None])[:, 0]
        (-(chosen * sample.advantages[1:] * sample.loss_mask[1:]).sum() / 7.0).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def gradients_packed(
    architecture: str,
    samples: list[Sample],
    packing: Packing,
    budget: int,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    *,
    recompute: bool = False,
) -> dict[str, torch.Tensor]:
    model = model_of(architecture, dtype, attention)
    if recompute:
        model.train()
        model.activation_checkpointing_enable()
    for batch in pack(samples, [7.0] * len(samples), packing=packing, tokens_per_micro_batch=budget):
        scores = token_logprobs(model, batch, use_temperature=True)
        (-(scores.logprobs * batch.advantages * batch.loss_mask / batch.denominator).sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_relative_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    scale = max(float(value.abs().max()) for value in reference.values())
    return max(float((ours[name] - value).abs().max()) for name, value in reference.items()) / scale


def tolerance(architecture: str, attention: str) -> float:
    """Relative, in float64; transformers' own eager attention takes its softmax in float32."""
    return 1e-6 if attention == "eager" and architecture != "gpt2" else 1e-9


def trained(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.trained_tokens]


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("packing", [*ROW_PACKINGS, "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 45, 100_000])
def test_gradients_equal_those_of_each_sequence_alone(
    architecture: str, packing: Packing, budget: int, attention: str
) -> None:
    samples = trained(random_tree_samples(3))
    reference = gradients_alone(architecture, samples)
    ours = gradients_packed(architecture, samples, packing, budget, attention)
    assert largest_relative_difference(ours, reference) < tolerance(architecture, attention)


@pytest.mark.parametrize("packing", [*ROW_PACKINGS, "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_float32_equal_those_of_each_sequence_alone(architecture: str, packing: Packing) -> None:
    samples = trained(random_tree_samples(3))
    reference = gradients_alone(architecture, samples, torch.float32)
    for attention in (TILED, "sdpa"):
        ours = gradients_packed(architecture, samples, packing, 10_000, attention, torch.float32)
        assert largest_relative_difference(ours, reference) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    packing=st.sampled_from(ROW_PACKINGS),
    budget=st.sampled_from([1, 60, 200, 100_000]),
    samples=forests(),
)
def test_gradients_of_any_forest_equal_those_of_each_sequence_alone(
    architecture: str, packing: Packing, budget: int, samples: list[Sample]
) -> None:
    samples = trained(samples)  # others are left out before packing
    reference = gradients_alone(architecture, samples)
    ours = gradients_packed(architecture, samples, packing, budget, TILED)
    assert largest_relative_difference(ours, reference) < 1e-9


@settings(max_examples=15, deadline=None)
@given(budget=st.integers(1, 200), packing=st.sampled_from([*ROW_PACKINGS, "padded"]), samples=forests())
def test_gradients_do_not_depend_on_the_token_budget(
    budget: int, packing: Packing, samples: list[Sample]
) -> None:
    samples = trained(samples)  # others are left out before packing
    whole = gradients_packed("gpt2", samples, "padded", 1)
    split = gradients_packed("gpt2", samples, packing, budget)
    assert largest_relative_difference(split, whole) < 1e-9


@pytest.mark.parametrize("attention", [TILED, "sdpa"])
def test_gradients_are_the_same_with_activation_recomputation(attention: str) -> None:
    samples = trained(random_tree_samples(5, count=20))
    reference = gradients_alone("llama", samples)
    ours = gradients_packed("llama", samples, "prefix_tree", 10_000, attention, recompute=True)
    assert largest_relative_difference(ours, reference) < 1e-9


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
    assert batch.subtree_end is not None
    assert batch.subtree_end.tolist() == [6, 5, 3, 5, 5, 6]
    attends = [row.nonzero()[:, 0].tolist() for row in dense_mask(batch.subtree_end)[0, 0]]
    assert attends == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 5]]


def test_plain_rows_hold_whole_sequences_with_restarting_positions() -> None:
    samples = [make_sample([1, 2, 3], 1), make_sample([1, 2, 4, 5], 1)]
    (batch,) = pack(samples, [1.0] * 2, packing="plain", tokens_per_micro_batch=100)
    assert sorted(zip(batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), strict=True)) == sorted(
        [(1, 0), (2, 1), (3, 2), (1, 0), (2, 1), (4, 2), (5, 3)]
    )
    assert batch.subtree_end is not None
    assert sorted(set(batch.subtree_end.tolist())) in ([3, 7], [4, 7])
    assert batch.padding_tokens == 0


@settings(max_examples=100, deadline=None)
@given(samples=forests())
def test_the_rule_is_that_of_a_tree_built_token_by_token(samples: list[Sample]) -> None:
    """Against prefixes themselves: a column stands for a prefix, and sees the columns of its own prefixes."""
    (batch,) = pack(samples, [1.0] * len(samples), packing="prefix_tree", tokens_per_micro_batch=1 << 30)
    assert batch.subtree_end is not None
    sequences = [tuple(sample.tokens.tolist()) for sample in samples]
    wanted = {sequence[: length + 1] for sequence in sequences for length in range(len(sequence))}
    mask = dense_mask(batch.subtree_end)[0, 0]
    tokens = batch.input_ids[0]
    prefixes = [tuple(tokens[row].tolist()) for row in mask]
    assert sorted(prefixes) == sorted(wanted)
    for prefix, row in zip(prefixes, mask, strict=True):
        seen = row.nonzero()[:, 0].tolist()
        assert [prefixes[column] for column in seen] == [prefix[: n + 1] for n in range(len(prefix))]
        assert batch.position_ids[0, seen].tolist() == list(range(len(prefix)))


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
    packing=st.sampled_from(["prefix_tree", "plain", "padded"]),
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
