"""Records that the engine works on: a request, its sequences, and what comes out.

Terms: a *request* is one prompt with `n` samples; a *sequence* is one of these samples. All ids are token
ids, all log-probs natural logarithms.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
TopLogProbs = list[tuple[int, float]]
"""(token id, log-prob), likeliest first."""


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How to continue a prompt; every default is the neutral value."""

    n: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: the whole vocabulary."""
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    """Until that many tokens, neither the end-of-sequence token nor a stop token can be sampled."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    include_stop_text: bool = False
    skip_special_tokens: bool = True
    top_logprobs: int = 0
    """Also return the log-probs of that many likeliest tokens at every position."""
    prompt_logprobs: int | None = None
    """None: do not score the prompt; k: score it and return the k likeliest tokens, too."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; the threshold is vLLM's."""
        return self.temperature < 1e-5

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are cut off before sampling."""
        return not self.greedy and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


@dataclass(frozen=True)
class ScoredPromptToken:
    """One prompt token under the model, given the tokens before it."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest."""
    top: TopLogProbs


@dataclass(eq=False)
class Sequence:
    """One sample in the making. It has `len(output_ids) - 1` of its own tokens in the cache while it runs."""

    request: GenerationRequest
    index: int
    seed: int
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogProbs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: str | None = None
    """Set early only by a stop string."""

    def cached_ids(self) -> list[int]:
        """Tokens whose keys and values must be in the cache before the next decoding step."""
        return self.request.prompt_ids + self.output_ids[:-1]

    def longest(self) -> int:
        """Most tokens that this sequence can grow to."""
        return len(self.request.prompt_ids) + self.request.parameters.max_tokens


@dataclass(frozen=True)
class Completion:
    """One finished sample."""

    token_ids: list[int]
    """The end-of-sequence or stop token included."""
    logprobs: list[float]
    top_logprobs: list[TopLogProbs]
    finish_reason: FinishReason
    stop_reason: int | str | None
    text: str


@dataclass(frozen=True)
class Generation:
    """A finished request."""

    prompt_ids: list[int]
    completions: list[Completion]
    prompt_scores: list[ScoredPromptToken | None] | None
    """Per prompt token, None for the first; None as a whole if not asked for (or aborted before)."""
    weight_version: str
    weight_version_start: str | None


@dataclass(eq=False)
class GenerationRequest:
    """One prompt to continue; `future` receives the `Generation`, or the exception it died of."""

    prompt_ids: list[int]
    parameters: SamplingParameters
    future: Future[Generation] = field(default_factory=Future)
    sequences: list[Sequence] = field(default_factory=list)
    prompt_scores: list[ScoredPromptToken | None] | None = None
    weight_version_start: str | None = None
    """The label when the engine took the request."""

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)
