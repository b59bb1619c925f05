"""From finished requests to replies, in the shapes of vLLM and of Atropos."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from itertools import accumulate

from local_stack.inference.records import Request, Sequence, TopLogProbs
from local_stack.inference.text import TextCodec
from schemas.inference import (
    ChatCompletionChoice,
    ChatCompletionReply,
    ChatReplyMessage,
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


def completion_reply(
    codec: TextCodec, model: str, body: CompletionRequest, requests: ListLike[Request]
) -> CompletionReply:
    """Make the reply of `/v1/completions`: the samples of all prompts in one list."""

    def name(token_id: int) -> str:
        return f"token_id:{token_id}" if body.return_tokens_as_token_ids else codec.decode([token_id])

    def logprobs(sequence: Sequence) -> CompletionLogProbs:
        tokens = [name(token_id) for token_id in sequence.output_ids]
        return CompletionLogProbs(
            text_offset=list(accumulate(map(len, tokens[:-1]), initial=0))[: len(tokens)],
            token_logprobs=list(sequence.logprobs),
            tokens=tokens,
            top_logprobs=[{name(token): value for token, value in pairs} for pairs in _candidates(sequence)],
        )

    choices: list[CompletionChoice] = []
    for request in requests:
        choices.extend(
            CompletionChoice(
                index=number,
                text=sequence.text,
                logprobs=None if body.logprobs is None else logprobs(sequence),
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                token_ids=sequence.output_ids if body.return_token_ids else None,
                prompt_logprobs=_prompt_logprobs(request),
                prompt_token_ids=request.prompt_ids if body.return_token_ids else None,
            )
            for number, sequence in enumerate(request.sequences, start=len(choices))
        )
    return CompletionReply(model=model, choices=choices, usage=_usage(requests))


def chat_reply(model: str, request: Request) -> ChatCompletionReply:
    """Make the reply of `/v1/chat/completions`."""
    choices = [
        ChatCompletionChoice(
            index=number,
            message=ChatReplyMessage(content=sequence.text),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        for number, sequence in enumerate(request.sequences)
    ]
    return ChatCompletionReply(model=model, choices=choices, usage=_usage([request]))


def generate_reply(body: GenerateRequest, request: Request) -> GenerateReply:
    """Make the reply of `/generate`."""
    logprobs = None
    if body.logprobs is not None:
        logprobs = [[[dict(pairs)] for pairs in _candidates(sequence)] for sequence in request.sequences]
    return GenerateReply(
        text=[sequence.text for sequence in request.sequences],
        finish_reasons=[sequence.finish_reason or "abort" for sequence in request.sequences],
        prompt_token_ids=request.prompt_ids,
        token_ids=[sequence.output_ids for sequence in request.sequences],
        logprobs=logprobs,
        prompt_logprobs=request.prompt_scores,
        weight_version=request.weight_version,
        weight_version_start=request.weight_version_start,
    )


def _candidates(sequence: Sequence) -> list[TopLogProbs]:
    """Per position: the sampled token, then its likeliest rivals."""
    positions = zip(sequence.output_ids, sequence.logprobs, sequence.top_logprobs, strict=True)
    return [[(token_id, logprob), *top] for token_id, logprob, top in positions]


def _prompt_logprobs(request: Request) -> PromptLogProbs | None:
    if request.prompt_scores is None:
        return None
    return [
        None if entry is None else {token: TokenLogProb(logprob=value) for token, value in entry.items()}
        for entry in request.prompt_scores
    ]


def _usage(requests: ListLike[Request]) -> Usage:
    prompt = sum(len(request.prompt_ids) for request in requests)
    completion = sum(len(s.output_ids) for request in requests for s in request.sequences)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
