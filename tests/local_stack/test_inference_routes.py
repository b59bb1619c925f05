"""Routes: shapes of replies, refusals, and clients that go away."""

from __future__ import annotations

import gc
import socket
from typing import Any

import httpx
import pytest

from schemas.inference import CompletionReply, ErrorReply, ModelList, TokenizeReply
from tests.conftest import RunningInferenceServer
from tests.local_stack.inference_reference import wait_for

PROMPT = [1, 87, 85, 71, 84, 201]


def refusal(response: httpx.Response, status: int = 400) -> str:
    """The message of an error in vLLM's shape."""
    assert response.status_code == status, response.text
    error = ErrorReply.model_validate_json(response.content).error
    assert error.code == status
    return error.message


def test_the_served_model_is_named_with_its_limits(shared_inference_server: RunningInferenceServer) -> None:
    (card,) = ModelList.model_validate_json(shared_inference_server.client.get("/v1/models").content).data
    assert (card.id, card.max_model_len) == ("tiny", 2048)
    assert card.root == str(shared_inference_server.model_directory)
    assert shared_inference_server.client.get("/health").content == b""


def test_several_prompts_and_samples_come_back_in_order(
    shared_inference_server: RunningInferenceServer,
) -> None:
    body = {"prompt": [PROMPT, [5, 6], [7]], "n": 2, "max_tokens": 3, "ignore_eos": True}
    reply = CompletionReply.model_validate_json(shared_inference_server.post("/v1/completions", body).content)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3, 4, 5]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (9, 18)
    assert all(choice.token_ids is None and choice.logprobs is None for choice in reply.choices)


def test_text_and_token_prompts_mean_the_same(shared_inference_server: RunningInferenceServer) -> None:
    reply = TokenizeReply.model_validate_json(
        shared_inference_server.post("/tokenize", {"prompt": "héllo"}).content
    )
    ids = reply.tokens
    assert (reply.count, reply.max_model_len) == (len(ids), 2048)
    from_text, from_ids = (
        shared_inference_server.complete(prompt, temperature=0, max_tokens=5) for prompt in ("héllo", ids)
    )
    assert from_text[0]["prompt_token_ids"] == ids
    assert from_text[0]["token_ids"] == from_ids[0]["token_ids"]


def test_chat_renders_the_template_and_equals_a_completion_of_the_same_tokens(
    shared_inference_server: RunningInferenceServer,
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    reply = shared_inference_server.post("/v1/chat/completions", body).json()
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (completion,) = shared_inference_server.complete(prompt, temperature=0, max_tokens=6)
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": completion["text"]}
    assert choice["finish_reason"] == completion["finish_reason"]
    assert reply["object"] == "chat.completion"
    assert reply["usage"]["prompt_tokens"] == len(completion["prompt_token_ids"])


def test_generate_answers_as_atropos_reads_it(shared_inference_server: RunningInferenceServer) -> None:
    body = {"prompt": {"prompt_token_ids": PROMPT}, "n": 3, "max_tokens": 4, "logprobs": 0}
    reply = shared_inference_server.post("/generate", {**body, "prompt_logprobs": 1}).json()
    assert reply["prompt_token_ids"] == PROMPT
    assert len(reply["text"]) == len(reply["finish_reasons"]) == len(reply["token_ids"]) == 3
    for ids, entries in zip(reply["token_ids"], reply["logprobs"], strict=True):
        assert [int(next(iter(entry[0]))) for entry in entries] == ids
        assert all(next(iter(entry[0].values())) < 0 for entry in entries)
    first, *scored = reply["prompt_logprobs"]
    assert first is None
    assert [int(next(iter(entry))) for entry in scored] == PROMPT[1:]
    assert reply["weight_version"] == "default"
    assert shared_inference_server.post("/generate", {**body, "logprobs": None}).json()["logprobs"] is None


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "cannot be empty"),
        ({"prompt": ""}, "cannot be empty"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5, 259]}, "259 is out of vocabulary"),
        ({"prompt": [7] * 2048}, "maximum context length is 2048"),
        ({"max_tokens": 2049}, "max_tokens must be in [1, 2048], got 2049"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"n": 0}, "n: Input should be"),
        ({"n": 2, "temperature": 0}, "greedy"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_tokens": 17}, "`min_tokens` is not supported"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [259]}, "out of vocabulary"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"echo": True}, "`echo` is not supported"),
        ({"stream": True}, "`stream` is not supported"),
        ({"repetition_penalty": 1.1}, "`repetition_penalty` is not supported"),
        ({"presence_penalty": 0.5}, "`presence_penalty` is not supported"),
        ({"logit_bias": {"5": 1}}, "`logit_bias` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_in_vllms_shape(
    shared_inference_server: RunningInferenceServer, fields: dict[str, Any], fragment: str
) -> None:
    assert fragment in refusal(shared_inference_server.post("/v1/completions", {"prompt": PROMPT} | fields))


def test_neutral_values_and_unknown_fields_are_accepted(
    shared_inference_server: RunningInferenceServer,
) -> None:
    fields = {"repetition_penalty": 1.0, "presence_penalty": 0, "echo": False, "seed": -1, "stop": None}
    fields |= {"user": "me"}
    assert shared_inference_server.complete(PROMPT, max_tokens=1, **fields)


def test_other_wrong_requests_are_refused_clearly(shared_inference_server: RunningInferenceServer) -> None:
    post = shared_inference_server.post
    assert "`other` does not exist" in refusal(
        post("/v1/completions", {"model": "other", "prompt": [5]}), 404
    )
    assert "Not Found" in refusal(shared_inference_server.client.get("/v2/completions"), 404)
    assert "Method Not Allowed" in refusal(shared_inference_server.client.get("/generate"), 405)
    assert "prompt_token_ids" in refusal(post("/generate", {"prompt": {}}))
    broken = shared_inference_server.client.post(
        "/generate", content=b"{", headers={"content-type": "application/json"}
    )
    assert "JSON" in refusal(broken)


def test_a_client_that_goes_away_ends_its_request(
    shared_inference_server: RunningInferenceServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = b'{"prompt": [5, 6, 7], "n": 4, "max_tokens": 2000, "ignore_eos": true}'
    host, port = shared_inference_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: shared_inference_server.engine.running == 4, "the request to run")
    wait_for(lambda: shared_inference_server.engine.running == 0, "the abandoned request to end")
    assert shared_inference_server.complete(PROMPT, max_tokens=1)
    gc.collect()  # asyncio complains of an exception that nobody looked at when its future is collected
    assert "never retrieved" not in caplog.text


def test_generate_takes_token_ids_in_stop(shared_inference_server: RunningInferenceServer) -> None:
    body = {"prompt": {"prompt_token_ids": PROMPT}, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    (whole,) = shared_inference_server.post("/generate", body).json()["token_ids"]
    second = whole[1]
    for stop in (second, ["no such text", second]):
        ended = shared_inference_server.post("/generate", {**body, "stop": stop}).json()
        assert ended["finish_reasons"] == ["stop"]
        assert ended["token_ids"][0] == whole[: whole.index(second) + 1]


def test_a_conversation_with_tool_calls_goes_on(shared_inference_server: RunningInferenceServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    body = {"messages": messages, "max_tokens": 2}
    reply = shared_inference_server.post("/v1/chat/completions", body)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] in (1, 2)


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
        ({"logprobs": True}, "`logprobs` is not supported"),
        ({"temperature": 3}, "temperature: Input should be less"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool_calls need a function"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ],
)
def test_what_a_chat_cannot_do_is_refused(
    shared_inference_server: RunningInferenceServer, fields: dict[str, Any], fragment: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1} | fields
    assert fragment in refusal(shared_inference_server.post("/v1/chat/completions", body))
