"""Real adapters, published to a real vLLM while environments sample from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.models import change_adapter
from tests.trainer.publishing import publishing_adapters
from tests.vllm.launching import VllmServer
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightStream
from trainer.publish import (
    Publisher,
    make_probes,
    score_with_model,
)

TEXT = list(range(5, 60))
PROMPT = [43, 72, 79, 79, 82]
TOLERANCE = 1e-3


@pytest.fixture
def model(vllm_model_directory: Path) -> Any:
    """A policy as training begins with: the adapter changes nothing yet."""
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(vllm_model_directory, dtype=torch.float32)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, settings)


@pytest.fixture
def server(vllm_server: VllmServer) -> Iterator[VllmServer]:
    """The shared server, without adapters afterwards."""
    yield vllm_server
    vllm_server.post("/atropos/adapter", {"name": None})
    for name in loaded(vllm_server):
        vllm_server.post("/v1/unload_lora_adapter", {"lora_name": name})


def publishing(
    model: Any, directory: Path, server: VllmServer, **options: Any
) -> AbstractContextManager[Publisher]:
    return publishing_adapters(
        model,
        directory,
        server.url,
        stream=WeightStream(model, read_base(str(server.model))),
        probes=make_probes(AutoTokenizer.from_pretrained(server.model), context=2048),
        **options,
    )


def loaded(server: VllmServer) -> list[str]:
    """The adapters that requests can name."""
    return [card["id"] for card in server.get("/v1/models").json()["data"] if card["parent"] is not None]


def served_scores(server: VllmServer, name: str) -> list[float]:
    """Log-probs of a text under one name, asked without any code of ours."""
    request = {"model": name, "prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
    reply = server.post("/v1/completions", request)
    assert reply.status_code == 200, reply.text
    positions = reply.json()["choices"][0]["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for token, entry in zip(TEXT[1:], positions, strict=True)]


def generate(server: VllmServer, **fields: Any) -> dict[str, Any]:
    """As an environment does: no model name at all."""
    request = {"prompt": {"prompt_token_ids": PROMPT}, "logprobs": 0, "temperature": 1.0, **fields}
    reply = server.post("/generate", request)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def sampled(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of the only sample."""
    (tokens,), (entries,) = answer["token_ids"], answer["logprobs"]
    return tokens, [next(iter(entry[0].values())) for entry in entries]


def trainers_logprobs(model: nn.Module, tokens: list[int]) -> list[float]:
    """The trainer's own, of tokens that follow the prompt."""
    (scores,) = score_with_model(model, [[*PROMPT, *tokens]], "cpu")
    return scores[len(PROMPT) - 1 :]


def test_five_versions_are_each_served_as_the_trainer_has_them(
    model: Any, server: VllmServer, tmp_path: Path
) -> None:
    names = []
    before = served_scores(server, "policy")
    with publishing(model, tmp_path, server, keep=2) as publisher:
        assert not publisher.start(0).already_served
        assert served_scores(server, loaded(server)[0]) == pytest.approx(before, abs=TOLERANCE)
        for version in range(1, 6):
            change_adapter(model, version)
            report = publisher.publish(version)
            names.append(server.get("/atropos/adapter").json()["name"])

            comparison = report.servers[0].comparison
            assert comparison is not None
            assert comparison.distinguishable
            assert report.pause_seconds == 0.0
            scores = served_scores(server, names[-1])
            (own,) = score_with_model(model, [TEXT], "cpu")
            assert scores == pytest.approx(own, abs=TOLERANCE)
            assert scores != pytest.approx(before, abs=0.1)
            before = scores

            answer = generate(server, max_tokens=16, seed=version)
            assert (answer["weight_version_start"], answer["weight_version"]) == (str(version),) * 2
            tokens, logprobs = sampled(answer)
            assert logprobs == pytest.approx(trainers_logprobs(model, tokens), abs=TOLERANCE)
    assert len(set(names)) == 5
    assert loaded(server) == names[-2:]
    gone = {"model": names[0], "prompt": TEXT, "max_tokens": 1}
    assert server.post("/v1/completions", gone).status_code == 404
    assert server.get("/weight_info").json()["weight_version"] == "5"


def test_a_rollout_in_flight_ends_with_the_adapter_that_it_began_with(
    model: Any, server: VllmServer, tmp_path: Path
) -> None:
    # With room for one adapter only, the engine reads the directory of the one in flight again when another
    # was loaded, and dies if it is gone. With room for two, as here, it has not been seen to; the directory
    # has to stay all the same.
    answers: list[dict[str, Any]] = []

    def roll_out() -> None:
        answers.append(generate(server, max_tokens=1200, ignore_eos=True))

    def keep_company() -> None:
        generate(server, n=24, max_tokens=1200, ignore_eos=True)

    with publishing(model, tmp_path, server, keep=1) as publisher:
        publisher.start(0)
        change_adapter(model, 1)
        publisher.publish(1)
        # Alone it might be over before the first publish: how fast the two are depends on the machine.
        company = threading.Thread(target=keep_company)
        company.start()
        rollout = threading.Thread(target=roll_out)
        rollout.start()
        overtaking = 0
        for version in range(2, 7):
            change_adapter(model, version)
            publisher.publish(version)
            overtaking += rollout.is_alive()
            if rollout.is_alive():
                assert any(path.name.endswith("-v000001") for path in tmp_path.iterdir())
                assert not any(name.endswith("-v000001") for name in loaded(server))
        rollout.join()
        company.join()
        publisher.publish(7)
        assert not any(path.name.endswith("-v000001") for path in tmp_path.iterdir())
    assert overtaking >= 2, "the rollout was over before the directory's turn came"
    assert answers[0]["weight_version"] == "1"
    change_adapter(model, 1)
    tokens, logprobs = sampled(answers[0])
    assert len(tokens) == 1200
    assert logprobs == pytest.approx(trainers_logprobs(model, tokens), abs=TOLERANCE)
    assert server.get("/health").status_code == 200


def test_a_trainer_that_starts_anew_takes_over(model: Any, server: VllmServer, tmp_path: Path) -> None:
    change_adapter(model, 1)
    with publishing(model, tmp_path, server) as publisher:
        publisher.start(1)
    (first,) = loaded(server)
    change_adapter(model, 2)  # another run reached other weights under the same number
    with publishing(model, tmp_path, server) as publisher:
        publisher.start(1)
    (second,) = loaded(server)
    assert first != second
    tokens, logprobs = sampled(generate(server, max_tokens=16, seed=1))
    assert logprobs == pytest.approx(trainers_logprobs(model, tokens), abs=TOLERANCE)
