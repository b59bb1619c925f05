"""Records that the engine works on: settings, a request, its sequences.

Terms: a *request* is one prompt with `n` samples; a *sequence* is one of these samples. All ids are token
ids, all log-probs natural logarithms.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from schemas.inference import CompletionRequest


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of loading the model, and of how much to run at once."""

    model: str
    """A Hugging Face directory (or hub id) with safetensors weights and a tokenizer."""
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and completion together; None: the model's own, at most 4096."""
    max_num_seqs: int = 64
    """Most sequences that run at once; the rest waits."""
    seed: int = 0
    """Of the sampling of requests without a seed of their own, together with their order of arrival."""


TopLogProbs = list[tuple[int, float]]
"""(token id, log-prob), likeliest first."""
PromptScores = list[dict[int, float] | None]
"""Per prompt token: id to log-prob, the token itself first, then the likeliest; None for token 0."""


@dataclass(eq=False)
class Sequence:
    """One sample in the making."""

    request: Request
    random: Random
    """Its own, so that a seed draws the same tokens whatever else runs in the batch."""
    output_ids: list[int] = field(default_factory=list)
    """The end-of-sequence or stop token included."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogProbs] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: int | str | None = None
    text: str = ""
    """Set when it ends."""

    def token_ids(self) -> list[int]:
        """Prompt and output."""
        return self.request.prompt_ids + self.output_ids


@dataclass(eq=False)
class Request:
    """One prompt to continue; made in the event loop that waits for it."""

    prompt_ids: list[int]
    parameters: CompletionRequest
    """The request that this prompt belongs to: how to continue it."""
    max_tokens: int
    """As asked for, or what the context has room for."""
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when every sequence has ended."""
    sequences: list[Sequence] = field(default_factory=list)
    prompt_scores: PromptScores | None = None
    """None if not asked for, or aborted before."""

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)
