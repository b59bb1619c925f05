"""From requests as they arrive to requests that the engine can run, or a clear refusal.

Limits follow vLLM 0.32. What this server cannot do is refused, never ignored: a penalty that was silently
left out would make the log-probs lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from local_stack.inference.engine import Engine
from local_stack.inference.errors import RequestRefused, validation_message
from local_stack.inference.records import Request, SamplingParameters
from schemas.inference import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GeneratePrompt,
    GenerateRequest,
)

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
_UNSUPPORTED_IN_CHAT = _UNSUPPORTED | {
    *("chat_template", "continue_final_message", "tools"),
    # Who needs tokens or log-probs uses `/v1/completions` or `/generate`.
    *("logprobs", "prompt_logprobs", "return_token_ids", "top_logprobs"),
}
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None, True),
    "best_of": (None, 1),
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "thinking_token_budget": (None, -1),
    "tool_choice": (None, "none", "auto"),
}
"""Their values that may be given all the same; of other fields those are None, false, 0 and empty ones."""


def completion_requests(engine: Engine, body: CompletionRequest) -> list[Request]:
    """Make one engine request per prompt."""
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if not prompts:
        raise RequestRefused("prompt must be provided and non-empty", parameter="prompt")
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return [_request(engine, dict(body), prompt, _UNSUPPORTED) for prompt in prompts]


def chat_request(engine: Engine, body: ChatCompletionRequest) -> Request:
    """Render the conversation; the completion may fill the rest of the context."""
    prompt_ids = engine.codec.encode_chat(
        [_plain_message(message) for message in body.messages],
        **(body.chat_template_kwargs or {}),
        add_generation_prompt=body.add_generation_prompt,
    )
    fields = dict(body)
    room = max(1, engine.max_model_len - len(prompt_ids))
    fields["max_tokens"] = body.max_completion_tokens or body.max_tokens or room
    return _request(engine, fields, prompt_ids, _UNSUPPORTED_IN_CHAT)


def generate_request(engine: Engine, body: GenerateRequest) -> Request:
    """Make the request of Atropos's own route: one prompt."""
    prompt = body.prompt
    if isinstance(prompt, GeneratePrompt):
        given = prompt.prompt if prompt.prompt_token_ids is None else prompt.prompt_token_ids
        if given is None:
            raise RequestRefused("prompt needs `prompt_token_ids` or `prompt`", parameter="prompt")
        prompt = given
    return _request(engine, dict(body), prompt, _UNSUPPORTED)


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


def _request(
    engine: Engine,
    fields: Mapping[str, Any],
    prompt: str | list[int],
    unsupported: frozenset[str],
) -> Request:
    for name in sorted(unsupported & fields.keys()):
        value, harmless = fields[name], _ASKS_FOR_NOTHING.get(name)
        if value not in harmless if harmless else value:
            raise RequestRefused(
                f"`{name}` is not supported by the embedded server; leave it out, or use vLLM", parameter=name
            )
    prompt_ids = engine.codec.encode(prompt) if isinstance(prompt, str) else prompt
    parameters = _parameters(fields)
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
    if parameters.max_tokens > length:
        raise RequestRefused(
            f"max_tokens must be in [1, {length}], got {parameters.max_tokens}", parameter="max_tokens"
        )
    for name, ids in (("prompt", prompt_ids), ("stop_token_ids", parameters.stop_token_ids)):
        if outside := [token for token in ids if not 0 <= token < engine.vocabulary_size]:
            raise RequestRefused(
                f"Token id {outside[0]} is out of vocabulary: the model has {engine.vocabulary_size} tokens",
                parameter=name,
            )
    # Like vLLM: a completion that would not fit is allowed and ends at the context's end.
    room = min(parameters.max_tokens, length - len(prompt_ids))
    return Request(prompt_ids, parameters.model_copy(update={"max_tokens": room}))


def _parameters(fields: Mapping[str, Any]) -> SamplingParameters:
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if given.get("seed") == -1:  # vLLM's way to say none
        del given["seed"]
    try:
        parameters = SamplingParameters.model_validate(given)
    except ValidationError as error:
        details = error.errors()
        raise RequestRefused(validation_message(details), parameter=str(details[0]["loc"][0])) from error
    if parameters.greedy and parameters.n > 1:
        raise RequestRefused(f"n must be 1 when using greedy sampling, got {parameters.n}.", parameter="n")
    return parameters
