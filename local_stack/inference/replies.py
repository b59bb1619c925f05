"""From finished requests to a reply in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

from local_stack.inference.records import Request, Sequence, TopLogProbs
from local_stack.inference.text import TextCodec
from schemas.inference import (
    CompletionChoice,
    CompletionLogProbs,
    CompletionReply,
    CompletionRequest,
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
    prompt_tokens = sum(len(request.prompt_ids) for request in requests)
    completion_tokens = sum(len(s.output_ids) for request in requests for s in request.sequences)
    usage = Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    return CompletionReply(model=model, choices=choices, usage=usage)


def chat_reply(completion: CompletionReply) -> dict[str, Any]:
    """Make the reply of `/v1/chat/completions` of the completion's."""
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        for choice in completion.choices
    ]
    return {**completion.model_dump(), "object": "chat.completion", "choices": choices}


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
