"""Sampling draws from the distribution that was asked for, reproducibly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_stack.inference.sampling import sample
from schemas.inference import CompletionRequest
from tests.conftest import RunningInferenceServer

PROMPT = [1, 87, 85, 71, 84]


def asked(**fields: Any) -> CompletionRequest:
    """What a request says of the sampling."""
    return CompletionRequest(prompt=PROMPT, **fields)


def draw(logits: torch.Tensor, parameters: CompletionRequest, count: int, seed: int = 0) -> torch.Tensor:
    """Sample `count` tokens from one row of logits. [count]."""
    numbers = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    outcome = sample(logits.expand(count, -1), [parameters] * count, numbers)
    return torch.tensor([each.token_id for each in outcome])


@given(
    vocabulary=st.integers(1, 700),
    temperature=st.floats(0.2, 2.0),
    number=st.floats(0.0, 1.0, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_token_is_the_one_whose_share_of_the_cumulative_distribution_the_number_hits(
    vocabulary: int, temperature: float, number: float, seed: int
) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    parameters = asked(temperature=temperature)
    outcome = sample(logits, [parameters], [number])
    cumulative = (logits[0].double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    ((token, logprob, _),) = outcome
    # Float32 probabilities against float64 ones: the boundary may lie a little beside.
    assert (cumulative[token - 1].item() if token else 0.0) <= number + 1e-5
    assert cumulative[token].item() >= number - 1e-5
    assert logprob == pytest.approx(logits[0].double().log_softmax(dim=-1)[token].item(), abs=1e-4)


def test_frequencies_match_the_distribution() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)) * 2
    count = 10_000
    counts = torch.bincount(draw(logits, asked(), count), minlength=1000)
    expected = logits[0].softmax(dim=-1) * count
    likely = expected > 20
    chi_squared = ((counts - expected) ** 2 / expected)[likely].sum().item()
    degrees = int(likely.sum())
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees)


def test_impossible_tokens_are_never_drawn_even_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, 255] = logits[:, 300] = 0.0
    numbers = [0.0, 0.5, math.nextafter(1.0, 0.0)]
    outcome = sample(logits, [asked()] * 3, numbers)
    assert [each.token_id for each in outcome] == [255, 300, 300]


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        (asked(top_k=2), {0, 1}),
        (asked(top_p=0.49), {0}),
        (asked(top_p=0.51), {0, 1}),
        (asked(min_p=0.31), {0, 1}),
        (asked(top_k=3, top_p=0.6), {0, 1}),
        (asked(temperature=0.0), {0}),
        (asked(), {0, 1, 2, 3}),
    ],
)
def test_truncation_keeps_exactly_the_tokens_it_should(
    parameters: CompletionRequest, allowed: set[int]
) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draw(logits, parameters, 2000).tolist()) == allowed


def test_rows_with_different_parameters_do_not_disturb_one_another() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    parameters = [
        asked(),
        asked(temperature=0.0),
        asked(top_k=1),
        asked(temperature=0.7, top_p=0.9, logprobs=2),
    ]
    numbers = [0.1, 0.2, 0.3, 0.4]
    together = sample(logits, parameters, numbers)
    alone = [sample(logits[[row]], [parameters[row]], [numbers[row]])[0] for row in range(4)]
    tokens = [each.token_id for each in together]
    assert tokens == [each.token_id for each in alone]
    assert tokens[1:3] == logits[1:3].argmax(dim=-1).tolist()
    assert [len(each.top) for each in together] == [0, 0, 0, 2]


def test_a_seed_reproduces_its_samples_whatever_runs_beside(
    shared_inference_server: RunningInferenceServer,
) -> None:
    fields = {"max_tokens": 20, "seed": 11, "ignore_eos": True}
    alone = shared_inference_server.complete(PROMPT, n=3, **fields)
    shared_inference_server.complete(PROMPT, n=2, max_tokens=3)
    mixed = shared_inference_server.complete([PROMPT, [5, 6, 7]], n=3, **fields)
    assert [choice["token_ids"] for choice in alone] == [choice["token_ids"] for choice in mixed[:3]]
    assert len({tuple(choice["token_ids"]) for choice in alone}) == 3
    assert (
        shared_inference_server.complete(PROMPT, **fields | {"seed": 12})[0]["token_ids"]
        == alone[1]["token_ids"]
    )


def test_without_a_seed_the_servers_seed_and_the_order_decide(
    start_inference_server, tiny_model_directory
) -> None:  # type: ignore[no-untyped-def]
    def two_requests(seed: int) -> list[list[int]]:
        server = start_inference_server(tiny_model_directory, seed=seed)
        return [server.complete(PROMPT, max_tokens=12, ignore_eos=True)[0]["token_ids"] for _ in range(2)]

    first, again, other = two_requests(1), two_requests(1), two_requests(2)
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_greedy_takes_the_likeliest_token(shared_inference_server: RunningInferenceServer) -> None:
    (choice,) = shared_inference_server.complete(
        PROMPT, temperature=0, max_tokens=8, logprobs=1, ignore_eos=True
    )
    for value, top in zip(
        choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert value == max(top.values())
