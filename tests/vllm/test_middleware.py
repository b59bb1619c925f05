"""`/generate` on a real vLLM: what Atropos's own client reads there is what the model says.

The reference is the same model in transformers, in double precision, one sequence at a time.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import pytest

from tests.local_stack.inference_reference import Reference, wait_for
from tests.vllm.atropos import make_manager
from tests.vllm.launching import VllmServer

TOLERANCE = 1e-3
PROMPT = [43, 72, 79, 79, 82, 35]
LETTERS = [68, 69, 70]
"""Token ids of `a`, `b`, `c`."""


@pytest.fixture(scope="module")
def reference(vllm_model_directory: Path) -> Reference:
    """The model that the server serves."""
    return Reference(vllm_model_directory)


@pytest.fixture
def label(vllm_server: VllmServer) -> Iterator[str]:
    """The server's label, put back after the test."""
    before = str(vllm_server.get("/weight_info").json()["weight_version"])
    yield before
    assert vllm_server.post("/update_weight_version", {"new_version": before}).status_code == 200


def generate(server: VllmServer, **request: Any) -> dict[str, Any]:
    reply = server.post("/generate", {"prompt": {"prompt_token_ids": PROMPT}, "logprobs": 0, **request})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


# --- through Atropos's client ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_every_sampled_token_has_the_models_own_log_prob(
    vllm_server: VllmServer, reference: Reference, temperature: float
) -> None:
    manager = make_manager(vllm_server)
    prompt, outputs, logprobs, reasons = await manager.tokens_and_logprobs_completion(
        prompt="What is 2+2?", n=8, max_tokens=24, temperature=temperature
    )
    assert prompt == manager.servers[0].tokenizer.encode("What is 2+2?")
    assert len(outputs) == len(logprobs) == len(reasons) == 8
    assert len({tuple(ids) for ids in outputs}) > 1, "all samples are the same"
    for ids, values, reason in zip(outputs, logprobs, reasons, strict=True):
        assert values == pytest.approx(reference.logprobs(prompt, ids), abs=TOLERANCE)
        assert reason == ("length" if len(ids) == 24 else "stop")


async def test_prompt_log_probs_hold_the_prompt_and_its_likeliest_rivals(
    vllm_server: VllmServer, reference: Reference
) -> None:
    payload = await make_manager(vllm_server).servers[0].get_logprobs(input_ids=PROMPT, top_k=5)
    assert payload["prompt_tokens"] == PROMPT
    ids, values = payload["prompt_topk_token_ids"], payload["prompt_topk_logprobs"]
    assert len(ids) == len(values) == len(PROMPT)
    assert ids[0] == values[0] == []
    table = reference.distributions(PROMPT)
    for at in range(1, len(PROMPT)):
        assert ids[at][0] == PROMPT[at]
        assert set(ids[at]) == {PROMPT[at], *table[at - 1].topk(5).indices.tolist()}
        assert values[at] == pytest.approx(table[at - 1, ids[at]].tolist(), abs=TOLERANCE)


async def test_a_managed_server_builds_training_sequences_over_two_turns(
    vllm_server: VllmServer, reference: Reference
) -> None:
    manager = make_manager(vllm_server)
    async with manager.managed_server(tokenizer=manager.servers[0].tokenizer) as managed:
        first = await managed.chat_completion(
            messages=[{"role": "user", "content": "What is 2+2?"}], n=3, max_tokens=12, temperature=1.0
        )
        nodes = managed.get_state()["nodes"]
    assert len(first.choices) == len(nodes) == 3
    for node in nodes:
        trained = [at for at, mask in enumerate(node.masked_tokens) if mask != -100]
        start = trained[0]
        assert trained == list(range(start, len(node.tokens)))
        assert node.masked_tokens[start:] == node.tokens[start:]
        assert node.logprobs[:start] == [1.0] * start
        expected = reference.logprobs(node.tokens[:start], node.tokens[start:])
        assert node.logprobs[start:] == pytest.approx(expected, abs=TOLERANCE)


# --- the route itself -----------------------------------------------------------------------------


def test_the_likeliest_tokens_are_named_by_their_ids(vllm_server: VllmServer, reference: Reference) -> None:
    answer = generate(vllm_server, logprobs=4, max_tokens=6, n=2)
    for ids, positions in zip(answer["token_ids"], answer["logprobs"], strict=True):
        table = reference.distributions([*PROMPT, *ids])
        for at, (token, (entry,)) in enumerate(zip(ids, positions, strict=True), start=len(PROMPT) - 1):
            assert int(next(iter(entry))) == token
            assert {int(key) for key in entry} == {token, *table[at].topk(4).indices.tolist()}
            for key, value in entry.items():
                assert value == pytest.approx(table[at, int(key)].item(), abs=TOLERANCE)


def test_a_stop_string_ends_the_text_and_every_token_has_its_log_prob(vllm_server: VllmServer) -> None:
    letters = {"allowed_token_ids": LETTERS, "temperature": 0.0, "max_tokens": 12}
    whole = generate(vllm_server, **letters)
    (text,), (ids,) = whole["text"], whole["token_ids"]
    assert len(text) == 12
    stop = text[5:7]  # two tokens
    at = text.index(stop)
    stopped = generate(vllm_server, stop=["never", stop], **letters)
    assert (stopped["text"], stopped["finish_reasons"]) == ([text[:at]], ["stop"])
    assert stopped["token_ids"] == [ids[: at + 2]], "the tokens keep what completed the stop string"
    assert [int(next(iter(entry))) for (entry,) in stopped["logprobs"][0]] == ids[: at + 2]


@pytest.mark.parametrize("prompt", ["Hello, vLLM", {"prompt": "Hello, vLLM"}])
def test_a_text_prompt_is_its_tokenization(vllm_server: VllmServer, prompt: Any) -> None:
    ids = vllm_server.post("/tokenize", {"prompt": "Hello, vLLM"}).json()["tokens"]
    as_text, as_ids = (
        generate(vllm_server, prompt=each, temperature=0.0, max_tokens=5, prompt_logprobs=0)
        for each in (prompt, {"prompt_token_ids": ids})
    )
    assert as_text["prompt_token_ids"] == ids
    assert as_text == as_ids


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 8, "temperature": 0.0}, "greedy"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"logprobs": 21}, "max allowed: 20"),
        ({"prompt": [10**9]}, "out of vocabulary"),
        ({"prompt": [1] * 3000}, "maximum context length"),
        ({"prompt": [[1, 2], [3]]}, "one prompt"),
        ({"stream": True}, "does not stream"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(
    vllm_server: VllmServer, request_: dict[str, Any], message: str
) -> None:
    reply = vllm_server.post("/generate", {"prompt": {"prompt_token_ids": PROMPT}, **request_})
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]


def test_a_model_that_does_not_exist_is_not_found(vllm_server: VllmServer) -> None:
    reply = vllm_server.post("/generate", {"prompt": PROMPT, "model": "another"})
    assert reply.status_code == 404
    assert "another" in reply.json()["error"]["message"]


def test_replies_say_between_which_labels_they_were_sampled(vllm_server: VllmServer, label: str) -> None:
    # On two busy cores vLLM answers nobody for seconds, so a label may come before or after the sampling.
    seen: list[tuple[str, str]] = []
    for attempt in range(10):
        new = str(17 + attempt)
        seen.append(labels_around_a_change(vllm_server, new))
        assert set(seen[-1]) <= {label, new}
        if seen[-1] == (label, new):
            break
        label = new
    assert seen[-1] == (label, new), seen
    after = generate(vllm_server, max_tokens=1)
    assert (after["weight_version_start"], after["weight_version"]) == (new, new)


def labels_around_a_change(server: VllmServer, new: str) -> tuple[str, str]:
    """The first and the last label of a reply; it was most likely being sampled when `new` came."""
    answers: list[dict[str, Any]] = []
    work = {"max_tokens": 1500, "ignore_eos": True, "n": 2}
    thread = threading.Thread(target=lambda: answers.append(generate(server, **work)))
    thread.start()
    sleep(0.3)
    assert server.post("/update_weight_version", {"new_version": new}).status_code == 200
    thread.join(120)
    return answers[0]["weight_version_start"], answers[0]["weight_version"]


def test_a_client_that_goes_away_frees_the_engine(vllm_server: VllmServer) -> None:
    # As above: a server that is deaf for seconds may learn of it too late once, but not every time.
    shares = [sampled_for_one_who_goes_away(vllm_server)]
    while shares[-1] > 0.5 and len(shares) < 6:
        shares.append(sampled_for_one_who_goes_away(vllm_server))
    assert 0 < shares[-1] <= 0.5, f"it ran on for nobody: {shares}"


def sampled_for_one_who_goes_away(server: VllmServer) -> float:
    """The share of its tokens that were sampled for a request whose caller waited for one second.

    The request is four times what the server samples at once: a fast machine needs seconds for it too.
    """
    completions, length = 128, 2000
    body = {"prompt": PROMPT, "max_tokens": length, "ignore_eos": True, "n": completions}
    before = server.metric("vllm:generation_tokens_total")
    answer = None
    with server.client(timeout=1.0) as client, contextlib.suppress(httpx.ReadTimeout):
        answer = client.post("/generate", json=body)
    assert answer is None, f"answered within a second: {answer.status_code} {answer.text[:500]}"
    wait_for(lambda: running(server) == 0, "the engine to drop the requests")
    return (server.metric("vllm:generation_tokens_total") - before) / (completions * length)


def test_a_stream_of_another_route_passes_through(vllm_server: VllmServer) -> None:
    with (
        vllm_server.client() as client,
        client.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 3, "stream": True}
        ) as reply,
    ):
        events = [line for line in reply.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert len(json.loads(events[0].removeprefix("data: "))["choices"]) == 1


def running(server: VllmServer) -> float:
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
