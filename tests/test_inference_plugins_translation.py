"""`/generate` for stock vLLM: what a request and a reply become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inference_plugins.atropos_generate import to_completion_request, to_generate_reply
from tests.test_inference_plugins import choice


def test_sampling_parameters_are_handed_on_and_silence_is_neutral() -> None:
    request = {"prompt": {"prompt_token_ids": [1]}, "n": 4, "temperature": 0.7, "stop": ["x"], "seed": None}
    assert to_completion_request(request) == {
        "prompt": [1],
        "n": 4,
        "temperature": 0.7,
        "stop": ["x"],
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


@pytest.mark.parametrize("prompt", ["hi", {"prompt": "hi"}, {"prompt": "hi", "prompt_token_ids": None}])
def test_text_prompts_stay_text(prompt: Any) -> None:
    assert to_completion_request({"prompt": prompt})["prompt"] == "hi"


def test_choices_are_put_in_order_and_prompt_log_probs_in_atropos_shape() -> None:
    scores = [
        None,
        {"8": {"logprob": -1.5, "rank": 2}, "5": {"logprob": float("-inf"), "rank": 9}},
    ]
    choices = [choice(index, tokens=(index,), prompt_logprobs=scores) for index in (1, 0)]
    reply = to_generate_reply({"choices": choices})
    assert reply["text"] == ["0", "1"]
    assert reply["logprobs"] == [[[{"0": -0.5}]], [[{"1": -0.5}]]]
    assert reply["prompt_logprobs"] == [None, {"8": -1.5, "5": -9999.0}]
    json.dumps(reply, allow_nan=False)


def test_the_sampled_token_comes_first_whatever_the_order_of_the_likeliest() -> None:
    top = [{"token_id:3": -0.1, "token_id:7": -0.5}]
    reply = to_generate_reply(
        {"choices": [choice(tokens=(7,), logprobs={"token_logprobs": [-0.5], "top_logprobs": top})]}
    )
    (((entry,),),) = reply["logprobs"]
    assert list(entry.items()) == [("7", -0.5), ("3", -0.1)]


@pytest.mark.parametrize(
    ("given", "stop", "ids"), [(7, [], [7]), ([7, "x"], ["x"], [3, 7]), ("x", "x", None), (None, None, None)]
)
def test_token_ids_in_stop_become_stop_token_ids(given: Any, stop: Any, ids: list[int] | None) -> None:
    request: dict[str, Any] = {"prompt": [1], "stop": given}
    if ids and len(ids) == 2:
        request["stop_token_ids"] = [3]
    rewritten = to_completion_request(request)
    assert (rewritten.get("stop"), rewritten.get("stop_token_ids")) == (stop, ids)
