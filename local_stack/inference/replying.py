"""From finished generations to replies, in the shapes of vLLM and of Atropos."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from local_stack.inference.sequences import Completion, Generation
from local_stack.inference.text import TextCodec
from schemas.inference import (
    LOWEST_LOGPROB,
    ChatCompletionChoice,
    ChatCompletionReply,
    ChatCompletionRequest,
    ChatLogProbs,
    ChatReplyMessage,
    ChatTokenLogProb,
    ChatTopLogProb,
    CompletionChoice,
    CompletionLogProbs,
    CompletionReply,
    CompletionRequest,
    GenerateReply,
    GenerateRequest,
    PromptLogProbs,
    TokenLogProb,
    Usage,
)


class ReplyWriter:
    """Writes replies for one model.

    Args:
        codec: Tokenizer of the model.
        model: The name that replies give to the model.
    """

    def __init__(self, codec: TextCodec, model: str) -> None:
        self._codec = codec
        self._model = model

    def completion(self, request: CompletionRequest, generations: ListLike[Generation]) -> CompletionReply:
        """Reply of `/v1/completions`: the samples of all prompts in one list."""
        as_ids = bool(request.return_tokens_as_token_ids)
        choices: list[CompletionChoice] = []
        for generation in generations:
            prompt_logprobs = self._prompt_logprobs(generation)
            first = len(choices)
            choices.extend(
                CompletionChoice(
                    index=first + number,
                    text=completion.text,
                    logprobs=None if request.logprobs is None else self._logprobs(completion, as_ids=as_ids),
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                    token_ids=completion.token_ids if request.return_token_ids else None,
                    prompt_logprobs=prompt_logprobs,
                    prompt_token_ids=generation.prompt_ids if request.return_token_ids else None,
                )
                for number, completion in enumerate(generation.completions)
            )
        return CompletionReply(model=self._model, choices=choices, usage=_usage(generations))

    def chat(self, request: ChatCompletionRequest, generation: Generation) -> ChatCompletionReply:
        """Reply of `/v1/chat/completions`."""
        as_ids = bool(request.return_tokens_as_token_ids)
        choices = [
            ChatCompletionChoice(
                index=number,
                message=ChatReplyMessage(content=completion.text),
                logprobs=self._chat_logprobs(completion, as_ids=as_ids) if request.logprobs else None,
                finish_reason=completion.finish_reason,
                stop_reason=completion.stop_reason,
                token_ids=completion.token_ids if request.return_token_ids else None,
            )
            for number, completion in enumerate(generation.completions)
        ]
        return ChatCompletionReply(
            model=self._model,
            choices=choices,
            usage=_usage([generation]),
            prompt_logprobs=self._prompt_logprobs(generation),
            prompt_token_ids=generation.prompt_ids if request.return_token_ids else None,
        )

    def generate(self, request: GenerateRequest, generation: Generation) -> GenerateReply:
        """Reply of `/generate`."""
        completions = generation.completions
        logprobs = None
        if request.logprobs is not None:
            logprobs = [[[dict(_candidates(c, at))] for at in range(len(c.token_ids))] for c in completions]
        prompt_logprobs = None
        if generation.prompt_scores is not None:
            prompt_logprobs = [
                None
                if score is None
                else {score.token_id: _finite(score.logprob)} | {i: _finite(value) for i, value in score.top}
                for score in generation.prompt_scores
            ]
        return GenerateReply(
            text=[completion.text for completion in completions],
            finish_reasons=[completion.finish_reason for completion in completions],
            prompt_token_ids=generation.prompt_ids,
            token_ids=[completion.token_ids for completion in completions],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            weight_version=generation.weight_version,
            weight_version_start=generation.weight_version_start,
        )

    def _token(self, token_id: int, *, as_ids: bool) -> str:
        return f"token_id:{token_id}" if as_ids else self._codec.decode([token_id])

    def _logprobs(self, completion: Completion, *, as_ids: bool) -> CompletionLogProbs:
        tokens = [self._token(token_id, as_ids=as_ids) for token_id in completion.token_ids]
        offsets = [0]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        return CompletionLogProbs(
            text_offset=offsets[: len(tokens)],
            token_logprobs=[_finite(value) for value in completion.logprobs],
            tokens=tokens,
            top_logprobs=[
                {
                    self._token(token_id, as_ids=as_ids): value
                    for token_id, value in _candidates(completion, at)
                }
                for at in range(len(tokens))
            ],
        )

    def _chat_logprobs(self, completion: Completion, *, as_ids: bool) -> ChatLogProbs:
        def entry(token_id: int, logprob: float) -> ChatTopLogProb:
            text = self._token(token_id, as_ids=as_ids)
            return ChatTopLogProb(token=text, logprob=_finite(logprob), bytes=list(text.encode()))

        content = [
            ChatTokenLogProb(
                **entry(token_id, logprob).model_dump(), top_logprobs=[entry(*candidate) for candidate in top]
            )
            for token_id, logprob, top in zip(
                completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
            )
        ]
        return ChatLogProbs(content=content)

    def _prompt_logprobs(self, generation: Generation) -> PromptLogProbs | None:
        if generation.prompt_scores is None:
            return None
        result: PromptLogProbs = []
        for score in generation.prompt_scores:
            if score is None:
                result.append(None)
                continue
            candidates = [(score.token_id, score.logprob, score.rank)]
            candidates += [
                (token_id, value, place) for place, (token_id, value) in enumerate(score.top, start=1)
            ]
            result.append(
                {
                    token_id: TokenLogProb(
                        logprob=_finite(value), rank=rank, decoded_token=self._codec.decode([token_id])
                    )
                    for token_id, value, rank in candidates
                }
            )
        return result


def _candidates(completion: Completion, at: int) -> list[tuple[int, float]]:
    """The sampled token at a position, then its likeliest rivals."""
    pairs = [(completion.token_ids[at], completion.logprobs[at]), *completion.top_logprobs[at]]
    return [(token_id, _finite(value)) for token_id, value in pairs]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _usage(generations: ListLike[Generation]) -> Usage:
    prompt = sum(len(generation.prompt_ids) for generation in generations)
    completion = sum(len(c.token_ids) for generation in generations for c in generation.completions)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
