"""The current adapter: environments keep asking `/generate`, and get another policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.local_stack.inference_reference import Reference
from tests.vllm.atropos import make_manager
from tests.vllm.launching import VllmServer

NAME = "policy-v000001"
PROMPT = [43, 72, 79, 79, 82]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def adapter(vllm_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random adapter, and the same as a whole model."""
    directory, merged = (tmp_path_factory.mktemp("adapter") / name for name in ("adapter", "merged"))
    model: Any = AutoModelForCausalLM.from_pretrained(vllm_model_directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    model.merge_and_unload().save_pretrained(merged)
    return directory, merged


@pytest.fixture
def loaded(vllm_server: VllmServer, adapter: tuple[Path, Path]) -> Iterator[VllmServer]:
    """The server with the adapter under its name, not yet the current one; without it after the test."""
    reply = vllm_server.post("/v1/load_lora_adapter", {"lora_name": NAME, "lora_path": str(adapter[0])})
    assert reply.status_code == 200, reply.text
    yield vllm_server
    vllm_server.post("/atropos/adapter", {"name": None})
    vllm_server.post("/v1/unload_lora_adapter", {"lora_name": NAME})


def greedy(server: VllmServer, **fields: Any) -> dict[str, Any]:
    request = {"prompt": PROMPT, "logprobs": 0, "temperature": 0.0, "max_tokens": 8, **fields}
    reply = server.post("/generate", request)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def test_environments_sample_from_the_current_adapter_under_their_old_model_name(
    loaded: VllmServer, adapter: tuple[Path, Path]
) -> None:
    base, merged = Reference(loaded.model), Reference(adapter[1])
    manager = make_manager(loaded)
    for name, reference, other in ((NAME, merged, base), (None, base, merged)):
        reply = loaded.post("/atropos/adapter", {"name": name, "weight_version": name and "1"})
        assert reply.json() == {"name": name, "weight_version": name and "1"}
        assert loaded.get("/atropos/adapter").json() == reply.json()
        prompt, outputs, logprobs, _ = await manager.tokens_and_logprobs_completion(
            prompt="What is 2+2?", n=4, max_tokens=16, temperature=1.0
        )
        for ids, values in zip(outputs, logprobs, strict=True):
            assert values == pytest.approx(reference.logprobs(prompt, ids), abs=TOLERANCE)
            assert values != pytest.approx(other.logprobs(prompt, ids), abs=0.1)


def test_an_adapter_that_is_gone_is_an_error_not_the_base_model(loaded: VllmServer) -> None:
    loaded.post("/atropos/adapter", {"name": NAME, "weight_version": "1"})
    assert loaded.post("/v1/unload_lora_adapter", {"lora_name": NAME}).status_code == 200
    reply = loaded.post("/generate", {"prompt": PROMPT})
    assert reply.status_code == 404
    assert NAME in reply.json()["error"]["message"]
