"""Atropos's own clients read the embedded server's replies."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import RunningInferenceServer
from tests.local_stack.inference_reference import Reference

pytest.importorskip("atroposlib")

TOLERANCE = 2e-4


def make_manager(server: RunningInferenceServer) -> Any:
    """Atropos's server manager with one vLLM server, as an environment makes it."""
    from atroposlib.envs.server_handling.server_manager import APIServerConfig, ServerManager

    config = APIServerConfig(
        model_name=server.model_name,
        base_url=f"{server.url}/v1",
        api_key="unused",
        tokenizer_name=str(server.model_directory),
        server_type="vllm",
        health_check=False,
        num_requests_for_eval=4,
    )
    return ServerManager([config])


async def test_vllm_server_parses_tokens_and_logprobs(
    shared_inference_server: RunningInferenceServer,
) -> None:
    manager = make_manager(shared_inference_server)
    prompt, outputs, logprobs, reasons = await manager.tokens_and_logprobs_completion(
        prompt="What is 2+2?", n=4, max_tokens=7, temperature=1.0
    )
    reference = Reference(shared_inference_server.model_directory)
    assert len(outputs) == len(logprobs) == len(reasons) == 4
    for ids, values, reason in zip(outputs, logprobs, reasons, strict=True):
        assert values == pytest.approx(reference.logprobs(prompt, ids), abs=TOLERANCE)
        assert reason in ("length", "stop")


async def test_vllm_server_parses_prompt_logprobs(shared_inference_server: RunningInferenceServer) -> None:
    payload = (
        await make_manager(shared_inference_server).servers[0].get_logprobs(input_ids=[5, 6, 7, 8], top_k=2)
    )
    assert payload["prompt_tokens"] == [5, 6, 7, 8]
    table = Reference(shared_inference_server.model_directory).distributions([5, 6, 7, 8])
    assert payload["prompt_topk_token_ids"][0] == []
    for position in (1, 2, 3):
        ids = payload["prompt_topk_token_ids"][position]
        assert ids[0] == [5, 6, 7, 8][position]
        assert payload["prompt_topk_logprobs"][position] == pytest.approx(
            table[position - 1, ids].tolist(), abs=TOLERANCE
        )


async def test_managed_server_builds_training_sequences(
    shared_inference_server: RunningInferenceServer,
) -> None:
    manager = make_manager(shared_inference_server)
    async with manager.managed_server(tokenizer=manager.servers[0].tokenizer) as managed:
        completion = await managed.chat_completion(
            messages=[{"role": "user", "content": "What is 2+2?"}], n=3, max_tokens=6, temperature=1.0
        )
        nodes = managed.get_state()["nodes"]
    assert len(completion.choices) == len(nodes) == 3
    reference = Reference(shared_inference_server.model_directory)
    for node in nodes:
        trained = [at for at, mask in enumerate(node.masked_tokens) if mask != -100]
        start = trained[0]
        assert trained == list(range(start, len(node.tokens)))
        assert node.logprobs[:start] == [1.0] * start
        expected = reference.logprobs(node.tokens[:start], node.tokens[start:])
        assert node.logprobs[start:] == pytest.approx(expected, abs=TOLERANCE)


async def test_openai_routes_of_the_vllm_server_work(shared_inference_server: RunningInferenceServer) -> None:
    manager = make_manager(shared_inference_server)
    chat = await manager.chat_completion(messages=[{"role": "user", "content": "hi"}], n=2, max_tokens=3)
    text = await manager.completion(prompt="hi", n=2, max_tokens=3)
    await manager.servers[0].openai.close()  # atroposlib leaves its connections to the garbage collector
    assert len(chat.choices) == len(text.choices) == 2
    assert chat.choices[0].message.role == "assistant"
