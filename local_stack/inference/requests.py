"""From a request as it arrives to requests that the engine can run, or a clear refusal.

Limits follow vLLM 0.32. What this server cannot do is refused, never ignored: a penalty that was silently
left out would make the log-probs lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from local_stack.inference.engine import Engine
from local_stack.inference.errors import RequestRefused
from local_stack.inference.records import Request
from local_stack.inference.sampling import is_greedy
from schemas.inference import ChatCompletionRequest, ChatMessage, CompletionRequest

_UNSUPPORTED = frozenset(
    {
        *("add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "echo", "frequency_penalty"),
        *("include_stop_str_in_output", "logit_bias", "logprob_token_ids", "min_tokens", "presence_penalty"),
        *("prompt_embeds", "repetition_detection", "repetition_penalty", "response_format", "stream"),
        *("structured_outputs", "suffix", "thinking_token_budget", "tool_choice", "truncate_prompt_tokens"),
        "use_beam_search",
    }
)
"""Fields that vLLM knows and this server does not."""
_UNSUPPORTED_IN_CHAT = frozenset(
    {
        *("chat_template", "continue_final_message", "tools"),
        # Who needs tokens or log-probs uses `/v1/completions` or `/generate`.
        *("logprobs", "prompt_logprobs", "return_token_ids", "top_logprobs"),
    }
)
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
}
"""Their values that may be given all the same, besides None, false, 0 and empty ones."""


def completion_requests(engine: Engine, body: CompletionRequest) -> list[Request]:
    """Make one engine request per prompt."""
    _refuse(_UNSUPPORTED, body.model_extra or {})
    if body.n > 1 and is_greedy(body):
        raise RequestRefused(f"n must be 1 when using greedy sampling, got {body.n}.", parameter="n")
    one = isinstance(body.prompt, str) or all(isinstance(each, int) for each in body.prompt)
    prompts: list[Any] = [body.prompt] if one else list(body.prompt)
    return [_request(engine, body, prompt) for prompt in prompts]


def render_chat(engine: Engine, body: ChatCompletionRequest) -> CompletionRequest:
    """Ask for a completion of the rendered conversation; it may fill the rest of the context."""
    sampling = body.model_extra or {}
    _refuse(_UNSUPPORTED_IN_CHAT, sampling)
    prompt_ids = engine.codec.encode_chat(
        [_plain_message(message) for message in body.messages],
        **(body.chat_template_kwargs or {}),
        add_generation_prompt=body.add_generation_prompt,
    )
    room = max(1, engine.max_model_len - len(prompt_ids))
    max_tokens = body.max_completion_tokens or body.max_tokens or room
    try:
        return CompletionRequest.model_validate({**sampling, "prompt": prompt_ids, "max_tokens": max_tokens})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _plain_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates expect it: its content one text, arguments of calls objects."""
    plain: dict[str, Any] = message.model_dump(exclude_none=True)
    for call in plain.get("tool_calls", ()):
        _read_arguments(call)
    if isinstance(message.content, list):
        for part in message.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestRefused(
                    f"only text parts are supported, found {part.get('type')!r}", parameter="messages"
                )
        plain["content"] = "\n".join(part["text"] for part in message.content)
    return {"content": "", **plain}


def _read_arguments(call: Any) -> None:
    """Put an object in the place of the text in which a client sends the arguments of a tool call."""
    try:
        function = call["function"]
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestRefused(
            "tool_calls need a function with its arguments as JSON", parameter="messages"
        ) from error


def _refuse(names: Set[str], given: Mapping[str, Any]) -> None:
    for name in sorted(names & given.keys()):
        if given[name] and given[name] not in _ASKS_FOR_NOTHING.get(name, ()):
            raise RequestRefused(
                f"`{name}` is not supported by the embedded server; leave it out, or use vLLM", parameter=name
            )


def _request(engine: Engine, body: CompletionRequest, prompt: str | list[int]) -> Request:
    prompt_ids = engine.codec.encode(prompt) if isinstance(prompt, str) else prompt
    length = engine.max_model_len
    if not prompt_ids:
        raise RequestRefused("The decoder prompt cannot be empty", parameter="prompt")
    if len(prompt_ids) >= length:
        raise RequestRefused(
            f"This model's maximum context length is {length} tokens. However, your prompt contains "
            f"{len(prompt_ids)} input tokens, which leaves no room for an output token. "
            "Please reduce the length of the input prompt.",
            parameter="input_tokens",
        )
    if body.max_tokens > length:
        raise RequestRefused(
            f"max_tokens must be in [1, {length}], got {body.max_tokens}", parameter="max_tokens"
        )
    for name, ids in (("prompt", prompt_ids), ("stop_token_ids", body.stop_token_ids)):
        if outside := [token for token in ids if not 0 <= token < engine.vocabulary_size]:
            raise RequestRefused(
                f"Token id {outside[0]} is out of vocabulary: the model has {engine.vocabulary_size} tokens",
                parameter=name,
            )
    # Like vLLM: a completion that would not fit is allowed and ends at the context's end.
    return Request(prompt_ids, body, max_tokens=min(body.max_tokens, length - len(prompt_ids)))
