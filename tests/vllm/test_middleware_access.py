"""Who may ask, under which path, and what the server's own settings change: a second real vLLM.

It has an API key and a root path, is not in development mode, loads the middleware by the name that it has
when installed, gives the log-probs of the distribution that was sampled from, and its model recommends greedy
sampling.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from inference_plugins.atropos_generate import LOWEST_LOGPROB
from tests.compose import ROOT
from tests.local_stack.inference_reference import Reference
from tests.vllm.launching import VLLM_PYTHON, VllmServer

KEY = "a-key-for-tests"
REQUEST = {"prompt": {"prompt_token_ids": [43, 72, 79]}, "logprobs": 0, "max_tokens": 8, "n": 8}


@pytest.fixture(scope="module")
def guarded(vllm_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """The server of this module."""
    assert VLLM_PYTHON.exists(), "`make vllm` installs vLLM"
    directory = tmp_path_factory.mktemp("guarded")
    model = directory / "model"
    shutil.copytree(vllm_model_directory, model)
    advice = {"do_sample": True, "temperature": 0.5, "top_k": 1, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(advice), encoding="utf-8")
    server = VllmServer(
        model,
        directory / "vllm.log",
        api_key=KEY,
        flags=["--root-path", "/behind/a/proxy", "--logprobs-mode", "processed_logprobs"],
        environment={"VLLM_SERVER_DEV_MODE": None, "PYTHONPATH": str(ROOT)},
        middleware="inference_plugins.atropos_generate.AtroposGenerate",
    )
    with server:
        yield server


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_without_the_key_nothing_is_answered(
    guarded: VllmServer, prefix: str, headers: dict[str, str]
) -> None:
    with httpx.Client(base_url=guarded.url + prefix, headers=headers, timeout=60) as client:
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        for reply in (
            client.post("/generate", json=REQUEST),
            client.post("/generate", json={**REQUEST, "model": "policy"}),
            client.get("/atropos/adapter"),
            client.post("/atropos/adapter", json={"name": None}),
        ):
            assert (reply.status_code, reply.json()) == (401, {"error": "Unauthorized"})


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
def test_with_the_key_both_routes_answer_below_the_root_path_and_without_it(
    guarded: VllmServer, prefix: str
) -> None:
    reply = guarded.post(f"{prefix}/generate", REQUEST)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["token_ids"]) == 8
    reply = guarded.get(f"{prefix}/atropos/adapter")
    assert (reply.status_code, reply.json()["name"]) == (200, None)


def test_a_server_without_labels_gives_replies_without_labels(guarded: VllmServer) -> None:
    assert guarded.get("/weight_info").status_code == 404
    assert not {"weight_version", "weight_version_start"} & guarded.post("/generate", REQUEST).json().keys()


def test_sampling_is_neutral_whatever_the_models_generation_config_recommends(guarded: VllmServer) -> None:
    completion = guarded.post(
        "/v1/completions", {"prompt": [43, 72, 79], "n": 8, "max_tokens": 8, "return_token_ids": True}
    ).json()
    recommended = {tuple(choice["token_ids"]) for choice in completion["choices"]}
    assert len(recommended) == 1, "the recommendation is not followed, so this test shows nothing"
    answer = guarded.post("/generate", REQUEST).json()
    assert len({tuple(ids) for ids in answer["token_ids"]}) > 4
    reference = Reference(guarded.model)
    for ids, positions in zip(answer["token_ids"], answer["logprobs"], strict=True):
        values = [next(iter(entry.values())) for (entry,) in positions]
        assert values == pytest.approx(reference.logprobs([43, 72, 79], ids), abs=1e-3)


def test_log_probs_after_temperature_and_truncation_are_handed_on_without_infinities(
    guarded: VllmServer,
) -> None:
    fields = {"temperature": 0.5, "top_k": 2, "logprobs": 4, "n": 4}
    reply = guarded.post("/generate", {**REQUEST, **fields})
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    reference = Reference(guarded.model)
    for ids, positions in zip(answer["token_ids"], answer["logprobs"], strict=True):
        # Dividing log-probs by the temperature is dividing logits by it, up to what the softmax takes away.
        table = reference.distributions([43, 72, 79, *ids]) / 0.5
        for row, token, (entry,) in zip(table[2:], ids, positions, strict=False):
            kept = row.topk(2)
            expected = dict(zip(kept.indices.tolist(), kept.values.log_softmax(-1).tolist(), strict=True))
            assert int(next(iter(entry))) == token
            found = {int(key): value for key, value in entry.items()}
            assert {key: value for key, value in found.items() if value > LOWEST_LOGPROB} == pytest.approx(
                expected, abs=1e-3
            )
            assert set(found) - set(expected), "nothing was cut off, so there was no infinity"
            assert {found[key] for key in set(found) - set(expected)} == {LOWEST_LOGPROB}
