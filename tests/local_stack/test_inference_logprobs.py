"""The served log-probs are the model's, whatever runs beside."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import RunningInferenceServer
from tests.local_stack.inference_reference import Reference

# Float32 on the server against float64 here.
TOLERANCE = 2e-4
StartServer = Callable[..., RunningInferenceServer]


@pytest.fixture(scope="module")
def reference(tiny_model_directory: Path) -> Reference:
    return Reference(tiny_model_directory)


def make_prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=length)


def test_sampled_logprobs_equal_an_independent_forward(
    shared_inference_server: RunningInferenceServer, reference: Reference
) -> None:
    prompt = make_prompt(20, seed=0)
    for choice in shared_inference_server.complete(prompt, n=4, max_tokens=12, ignore_eos=True):
        expected = reference.logprobs(prompt, choice["token_ids"])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)


def test_sixteen_clients_with_prompts_of_all_lengths_each_get_their_own_logprobs(
    shared_inference_server: RunningInferenceServer, reference: Reference
) -> None:
    prompts = [make_prompt(length, seed=length) for length in (1, 2, 3, 5, 8, 13, 17, 40, 64, 65, 90, 130)]
    shared = make_prompt(30, seed=99)  # four prompts with one beginning, one of them twice
    prompts += [[*shared, 7], [*shared, 8, 9], shared, shared]
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [
            pool.submit(
                shared_inference_server.complete, prompt, n=3, max_tokens=5 + 3 * number, ignore_eos=True
            )
            for number, prompt in enumerate(prompts)
        ]
    for number, (prompt, job) in enumerate(zip(prompts, jobs, strict=True)):
        for choice in job.result():
            assert len(choice["token_ids"]) == 5 + 3 * number
            expected = reference.logprobs(prompt, choice["token_ids"])
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)


def test_small_limits_only_make_requests_wait(
    tiny_model_directory: Path, start_inference_server: StartServer, reference: Reference
) -> None:
    server = start_inference_server(tiny_model_directory, max_num_seqs=3)
    prompts = [make_prompt(30, seed=1), make_prompt(70, seed=2), make_prompt(10, seed=3)]
    choices = server.complete(prompts, n=3, max_tokens=9, ignore_eos=True)
    assert [choice["index"] for choice in choices] == list(range(9))
    for choice in choices:
        prompt = prompts[choice["index"] // 3]
        assert choice["prompt_token_ids"] == prompt
        expected = reference.logprobs(prompt, choice["token_ids"])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("length", [2, 130, 700])
def test_prompt_logprobs_equal_an_independent_forward(
    shared_inference_server: RunningInferenceServer, reference: Reference, length: int
) -> None:
    prompt = make_prompt(length, seed=length)
    (choice,) = shared_inference_server.complete(prompt, max_tokens=1, prompt_logprobs=2)
    served = choice["prompt_logprobs"]
    table = reference.distributions(prompt)
    assert len(served) == length
    assert served[0] is None
    for position in range(1, length):
        own, *_ = served[position].items()
        assert own[0] == str(prompt[position])
        for token, entry in served[position].items():
            row = table[position - 1]
            assert entry["logprob"] == pytest.approx(row[int(token)].item(), abs=TOLERANCE)
        likeliest = set(map(str, table[position - 1].topk(2).indices.tolist()))
        assert set(served[position]) == likeliest | {str(prompt[position])}


def test_prompt_logprobs_of_zero_return_the_prompts_own_tokens_only(
    shared_inference_server: RunningInferenceServer,
) -> None:
    prompt = make_prompt(9, seed=4)
    (choice,) = shared_inference_server.complete(prompt, max_tokens=1, prompt_logprobs=0)
    assert [list(entry) for entry in choice["prompt_logprobs"][1:]] == [[str(token)] for token in prompt[1:]]


def test_logprobs_are_the_models_own_whatever_the_temperature(
    shared_inference_server: RunningInferenceServer, reference: Reference
) -> None:
    prompt = make_prompt(10, seed=5)
    fields = {"n": 4, "max_tokens": 6, "temperature": 0.5, "top_k": 20, "seed": 1, "ignore_eos": True}
    for choice in shared_inference_server.complete(prompt, **fields):
        expected = reference.logprobs(prompt, choice["token_ids"])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)


def test_top_logprobs_hold_the_likeliest_tokens(
    shared_inference_server: RunningInferenceServer, reference: Reference
) -> None:
    prompt = make_prompt(10, seed=6)
    (choice,) = shared_inference_server.complete(
        prompt, max_tokens=4, logprobs=3, return_tokens_as_token_ids=True, ignore_eos=True
    )
    table = reference.distributions([*prompt, *choice["token_ids"]])[len(prompt) - 1 : -1]
    for row, token, served in zip(
        table, choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        expected = {f"token_id:{i}" for i in [token, *row.topk(3).indices.tolist()]}
        assert set(served) == expected
        for name, value in served.items():
            assert value == pytest.approx(row[int(name.removeprefix("token_id:"))].item(), abs=TOLERANCE)
