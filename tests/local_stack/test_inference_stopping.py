"""Sequences end where vLLM would end them, and report it as vLLM does."""

from __future__ import annotations

from tests.conftest import RunningInferenceServer

PROMPT = [1, 87, 85, 71, 84, 201]
EOS = 2
# Enough samples that some end by themselves: one token in a few hundred is the end-of-sequence token.
MANY = {"n": 24, "max_tokens": 120, "seed": 0}


def test_the_end_of_sequence_token_ends_a_sequence_and_is_in_the_ids_but_not_in_the_text(
    shared_inference_server: RunningInferenceServer,
) -> None:
    choices = shared_inference_server.complete(PROMPT, **MANY)
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert 0 < len(ended) < len(choices)
    for choice in choices:
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
        assert choice["stop_reason"] is None
        assert "<|im_end|>" not in choice["text"]
        assert EOS not in choice["token_ids"][:-1]
        assert (choice["token_ids"][-1] == EOS) == (choice["finish_reason"] == "stop")
        assert choice["finish_reason"] == "stop" or len(choice["token_ids"]) == 120


def test_ignore_eos_goes_on_after_the_end_of_sequence_token(
    shared_inference_server: RunningInferenceServer,
) -> None:
    choices = shared_inference_server.complete(PROMPT, ignore_eos=True, **MANY)
    assert all(choice["finish_reason"] == "length" and len(choice["token_ids"]) == 120 for choice in choices)
    assert any(EOS in choice["token_ids"] for choice in choices)


def test_a_stop_token_ends_the_sequence_and_is_named(shared_inference_server: RunningInferenceServer) -> None:
    fields = {"max_tokens": 20, "seed": 3, "ignore_eos": True}
    (whole,) = shared_inference_server.complete(PROMPT, **fields)
    stop = whole["token_ids"][6]
    (choice,) = shared_inference_server.complete(PROMPT, stop_token_ids=[stop], **fields)
    first = whole["token_ids"].index(stop)
    assert choice["token_ids"] == whole["token_ids"][: first + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_stop_text_cuts_the_text_and_keeps_the_tokens_that_completed_it(
    shared_inference_server: RunningInferenceServer,
) -> None:
    fields = {"max_tokens": 60, "seed": 5, "ignore_eos": True}
    (whole,) = shared_inference_server.complete(PROMPT, **fields)
    position = next(i for i, c in enumerate(whole["text"]) if i >= 10 and c.isascii() and c.isprintable())
    stop = whole["text"][position]
    first = whole["text"].index(stop)
    (cut,) = shared_inference_server.complete(PROMPT, stop=["never seen", stop], **fields)
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert cut["text"] == whole["text"][:first]
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert 0 < len(cut["token_ids"]) < 60


def test_a_completion_ends_with_the_context(shared_inference_server: RunningInferenceServer) -> None:
    prompt = [7] * 2040
    (choice,) = shared_inference_server.complete(prompt, max_tokens=100, ignore_eos=True)
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 2048 - 2040
