"""From requests as they arrive to requests that the engine can run, or a clear refusal.

Limits and messages follow vLLM 0.32. What this server cannot do is refused, never ignored: a penalty that was
silently left out would make the log-probs lie.
"""

from __future__ import annotations

import math
from typing import Any

from local_stack.inference.errors import RequestRefused
from local_stack.inference.sequences import GenerationRequest, SamplingParameters
from local_stack.inference.text import TextCodec
from schemas.inference import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GeneratePrompt,
    GenerateRequest,
    SamplingFields,
)

_MOST_SAMPLES = 16_384
_MOST_LOGPROBS = 20

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprob_token_ids": (None,),
    "presence_penalty": (None, 0),
    "prompt_embeds": (None,),
    "repetition_detection": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "stream": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "thinking_token_budget": (None, -1),
    "tool_choice": (None, "none", "auto"),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Fields that vLLM knows and this server does not, with the values that ask for nothing."""


class RequestReader:
    """Checks requests against one model.

    Args:
        codec: Tokenizer of the model.
        vocabulary_size: Token ids are below this.
        max_model_len: Longest sequence in tokens.
    """

    def __init__(self, codec: TextCodec, *, vocabulary_size: int, max_model_len: int) -> None:
        self._codec = codec
        self._vocabulary_size = vocabulary_size
        self._max_model_len = max_model_len

    def completion(self, request: CompletionRequest) -> list[GenerationRequest]:
        """One engine request per prompt."""
        return [
            self._request(request, prompt_ids, request.max_tokens or 16, request.logprobs)
            for prompt_ids in self._prompts(request)
        ]

    def chat(self, request: ChatCompletionRequest) -> GenerationRequest:
        """Render the conversation; the completion may fill the rest of the context."""
        prompt_ids = self.chat_prompt(request)
        max_tokens = request.max_completion_tokens or request.max_tokens
        return self._request(
            request, prompt_ids, max_tokens, request.top_logprobs if request.logprobs else None
        )

    def chat_prompt(self, request: ChatCompletionRequest) -> list[int]:
        """Token ids of the conversation."""
        options: dict[str, Any] = dict(request.chat_template_kwargs or {})
        options["add_generation_prompt"] = request.add_generation_prompt
        if request.continue_final_message:
            options["continue_final_message"] = True
        if request.chat_template is not None:
            options["chat_template"] = request.chat_template
        if request.tools:
            options["tools"] = request.tools
        return self._codec.encode_chat([plain_message(message) for message in request.messages], **options)

    def generate(self, request: GenerateRequest) -> GenerationRequest:
        """Atropos's own route: one prompt."""
        prompt = request.prompt
        if isinstance(prompt, GeneratePrompt):
            given = prompt.prompt if prompt.prompt_token_ids is None else prompt.prompt_token_ids
            if given is None:
                raise RequestRefused("prompt needs `prompt_token_ids` or `prompt`", parameter="prompt")
            prompt = given
        prompt_ids = (
            self._codec.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        )
        return self._request(request, prompt_ids, request.max_tokens or 16, request.logprobs)

    def _prompts(self, request: CompletionRequest) -> list[list[int]]:
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = [prompt]
        if not prompt:
            raise RequestRefused("prompt must be provided and non-empty", parameter="prompt")
        if isinstance(prompt[0], int):
            prompt = [prompt]
        return [
            self._codec.encode(entry, add_special_tokens=request.add_special_tokens)
            if isinstance(entry, str)
            else list(entry)
            for entry in prompt
        ]

    def _request(
        self, fields: SamplingFields, prompt_ids: list[int], max_tokens: int | None, top_logprobs: int | None
    ) -> GenerationRequest:
        _refuse_unsupported(fields)
        self._check_prompt(prompt_ids)
        if fields.max_tokens is not None and fields.max_tokens < 1:
            raise _wrong("max_tokens", "must be at least 1", fields.max_tokens)
        if max_tokens is not None and max_tokens > self._max_model_len:
            raise RequestRefused(
                f"max_tokens={max_tokens} cannot be greater than max_model_len={self._max_model_len}. "
                "Please request fewer output tokens.",
                parameter="max_tokens",
            )
        room = self._max_model_len - len(prompt_ids)
        # Like vLLM: a completion that would not fit is allowed and ends at the context's end.
        parameters = _parameters(fields, min(max_tokens or room, room), top_logprobs)
        self._check_token_ids(parameters.stop_token_ids, "stop_token_ids")
        return GenerationRequest(prompt_ids, parameters)

    def _check_prompt(self, prompt_ids: list[int]) -> None:
        if not prompt_ids:
            raise RequestRefused("The decoder prompt cannot be empty", parameter="prompt")
        if len(prompt_ids) >= self._max_model_len:
            raise RequestRefused(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your prompt "
                f"contains {len(prompt_ids)} input tokens, which leaves no room for an output token. "
                "Please reduce the length of the input prompt.",
                parameter="input_tokens",
            )
        self._check_token_ids(prompt_ids, "prompt")

    def _check_token_ids(self, ids: list[int] | frozenset[int], parameter: str) -> None:
        outside = next((token for token in ids if not 0 <= token < self._vocabulary_size), None)
        if outside is not None:
            raise RequestRefused(
                f"Token id {outside} is out of vocabulary: the model has {self._vocabulary_size} tokens",
                parameter=parameter,
            )


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it: the content as one text."""
    plain: dict[str, Any] = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        texts = []
        for part in message.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestRefused(
                    f"only text parts are supported, found {part.get('type')!r}", parameter="messages"
                )
            texts.append(part["text"])
        plain["content"] = "\n".join(texts)
    return plain


def _refuse_unsupported(fields: SamplingFields) -> None:
    given = {**dict(fields), **(fields.model_extra or {})}
    for name, neutral in _UNSUPPORTED.items():
        if name in given and given[name] not in neutral:
            raise RequestRefused(
                f"`{name}` is not supported by the embedded server; leave it out, or use vLLM", parameter=name
            )


def _parameters(fields: SamplingFields, max_tokens: int, top_logprobs: int | None) -> SamplingParameters:
    n = 1 if fields.n is None else fields.n
    temperature = 1.0 if fields.temperature is None else fields.temperature
    top_p = 1.0 if fields.top_p is None else fields.top_p
    top_k = max(fields.top_k or 0, 0)
    min_p = fields.min_p or 0.0
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    if not 1 <= n <= _MOST_SAMPLES:
        raise _wrong("n", f"must be in [1, {_MOST_SAMPLES}]", n)
    if not (math.isfinite(temperature) and 0.0 <= temperature <= 2.0):
        raise _wrong("temperature", "must be in [0, 2]", temperature)
    if not 0.0 < top_p <= 1.0:
        raise _wrong("top_p", "must be in (0, 1]", top_p)
    if fields.top_k is not None and fields.top_k < -1:
        raise _wrong("top_k", "must be 0 (disable), or at least 1", fields.top_k)
    if not 0.0 <= min_p <= 1.0:
        raise _wrong("min_p", "must be in [0, 1]", min_p)
    if not 0 <= fields.min_tokens <= max_tokens:
        raise _wrong("min_tokens", f"must be in [0, max_tokens={max_tokens}]", fields.min_tokens)
    if "" in stop:
        raise RequestRefused("stop cannot contain an empty string.", parameter="stop")
    for name, count in (("logprobs", top_logprobs), ("prompt_logprobs", fields.prompt_logprobs)):
        if count is not None and not 0 <= count <= _MOST_LOGPROBS:
            raise _wrong(name, f"must be in [0, {_MOST_LOGPROBS}]", count)
    parameters = SamplingParameters(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=None if fields.seed == -1 else fields.seed,
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        stop=stop,
        stop_token_ids=frozenset(fields.stop_token_ids or ()),
        ignore_eos=fields.ignore_eos,
        include_stop_text=fields.include_stop_str_in_output,
        skip_special_tokens=fields.skip_special_tokens,
        top_logprobs=top_logprobs or 0,
        prompt_logprobs=fields.prompt_logprobs,
    )
    if parameters.greedy and n > 1:
        raise _wrong("n", "must be 1 when using greedy sampling", n)
    return parameters


def _wrong(name: str, rule: str, found: object) -> RequestRefused:
    return RequestRefused(f"{name} {rule}, got {found}.", parameter=name)
