"""`/generate` for stock vLLM: the middleware over a server that speaks vLLM's `/v1/completions`."""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from inference_plugins.atropos_generate import AtroposGenerate, to_completion_request, to_generate_reply
from local_stack.inference import Engine, create_app
from tests.conftest import RunningInferenceServer

PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture
def over(inference_server: RunningInferenceServer) -> Callable[[Any], httpx.AsyncClient]:
    """A client of the middleware around an application."""

    def over(app: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=AtroposGenerate(app))
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    return over


def embedded_app(engine: Engine) -> Any:
    """The embedded server's own application, but without the `/generate` that it has of its own."""
    app: FastAPI = create_app(engine, model_name="tiny")

    async def without_generate(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        assert scope["path"] != "/generate", "the middleware let /generate through"
        await app(scope, receive, send)

    return without_generate


async def test_it_answers_as_a_server_that_has_the_route(
    inference_server: RunningInferenceServer, over: Callable[[Any], httpx.AsyncClient]
) -> None:
    request = {"prompt": {"prompt_token_ids": PROMPT}, "logprobs": 0, "max_tokens": 5, "temperature": 0.0}
    native = inference_server.post("/generate", request).json()
    async with over(embedded_app(inference_server.engine)) as client:
        reply = await client.post("/generate", json=request)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    for key in ("text", "finish_reasons", "token_ids", "prompt_token_ids"):
        assert answer[key] == native[key], key
    (ours,), (theirs,) = answer["logprobs"], native["logprobs"]
    assert len(ours) == 5
    assert [list(entry[0]) for entry in ours] == [list(entry[0]) for entry in theirs]
    values = [next(iter(entry[0].values())) for entry in theirs]
    assert [next(iter(entry[0].values())) for entry in ours] == pytest.approx(values, abs=1e-4)


async def test_every_reply_of_a_group_carries_a_log_prob_for_each_token(
    inference_server: RunningInferenceServer, over: Callable[[Any], httpx.AsyncClient]
) -> None:
    request = {"prompt": {"prompt_token_ids": PROMPT}, "n": 8, "max_tokens": 6, "temperature": 1.0}
    async with over(embedded_app(inference_server.engine)) as client:
        answer = (await client.post("/generate", json=request)).json()
    assert len(answer["text"]) == len(answer["finish_reasons"]) == 8
    for tokens, logprobs in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert [int(next(iter(entry[0]))) for entry in logprobs] == tokens
        assert all(next(iter(entry[0].values())) < 0 for entry in logprobs)


async def test_a_refusal_reaches_the_caller_as_it_is(
    inference_server: RunningInferenceServer, over: Callable[[Any], httpx.AsyncClient]
) -> None:
    request = {"prompt": {"prompt_token_ids": PROMPT}, "max_tokens": -1}
    async with over(embedded_app(inference_server.engine)) as client:
        reply = await client.post("/generate", json=request)
    assert reply.status_code == 400
    assert "max_tokens" in reply.text


async def test_other_routes_pass_through(
    inference_server: RunningInferenceServer, over: Callable[[Any], httpx.AsyncClient]
) -> None:
    async with over(embedded_app(inference_server.engine)) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize("body", ["not json", "[]", "{}", '{"prompt": {"text": "hello"}}'])
async def test_what_is_not_a_generate_request_is_refused(
    inference_server: RunningInferenceServer, over: Callable[[Any], httpx.AsyncClient], body: str
) -> None:
    async with over(embedded_app(inference_server.engine)) as client:
        reply = await client.post("/generate", content=body)
    assert reply.status_code == 400
    assert "not a /generate request" in reply.json()["error"]


async def test_a_reply_without_tokens_is_an_error_not_a_guess(
    over: Callable[[Any], httpx.AsyncClient],
) -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions() -> dict[str, Any]:
        return {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}

    async with over(app) as client:
        reply = await client.post("/generate", json={"prompt": {"prompt_token_ids": PROMPT}})
    assert reply.status_code == 502
    assert "answered unexpectedly" in reply.json()["error"]


def test_sampling_parameters_are_handed_on_unchanged() -> None:
    request = {"prompt": {"prompt_token_ids": [1]}, "n": 4, "temperature": 0.7, "stop": ["x"], "logprobs": 0}
    assert to_completion_request(request) == {
        "prompt": [1],
        "n": 4,
        "temperature": 0.7,
        "stop": ["x"],
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_choices_are_put_in_order_and_prompt_log_probs_in_atropos_shape() -> None:
    def choice(index: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": str(index),
            "finish_reason": "stop",
            "token_ids": [index],
            "logprobs": {"token_logprobs": [-0.5]},
            "prompt_token_ids": [7, 8],
            "prompt_logprobs": [None, {"8": {"logprob": -1.5, "rank": 1, "decoded_token": "b"}}],
        }

    reply = to_generate_reply(json.loads(json.dumps({"choices": [choice(1), choice(0)]})))
    assert reply["text"] == ["0", "1"]
    assert reply["logprobs"] == [[[{"0": -0.5}]], [[{"1": -0.5}]]]
    assert reply["prompt_logprobs"] == [None, {"8": -1.5}]


def test_log_probs_that_do_not_match_the_tokens_are_refused() -> None:
    bad = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": [1, 2], "prompt_token_ids": [0]}
    with pytest.raises(ValueError, match="2 tokens but 1 log-probs"):
        to_generate_reply({"choices": [{**bad, "logprobs": {"token_logprobs": [-1.0]}}]})
