"""Which sequences run: queue, rows of the model, and one step of generation.

Before every step, waiting sequences that fit join the running ones. Runs inside the engine's thread; knows
nothing of threads or HTTP.
"""

from __future__ import annotations

import math
from collections import deque
from random import Random

import torch

from local_stack.inference.errors import EngineFailure
from local_stack.inference.model import Model, Rows
from local_stack.inference.records import EngineSettings, Request, Sequence
from local_stack.inference.sampling import sample
from local_stack.inference.text import TextCodec

_PREFILL_TOKENS = 4096
"""About how many padded prompt tokens are computed at once: bounds the memory and the wait of the others."""
_ENDED_SHARE = 8
"""Rows are taken out when one in so many has ended: taking out copies the cache, leaving in computes it."""


class Batch:
    """Queue and batch of sequences.

    Args:
        model: The model to run.
        codec: Says when sequences end.
        settings: Limits and the seed.
    """

    def __init__(self, model: Model, codec: TextCodec, settings: EngineSettings) -> None:
        self._model = model
        self._codec = codec
        self._settings = settings
        self._rows: Rows | None = None
        self._in_rows: list[Sequence] = []  # ended ones, too, until they are taken out
        self._waiting: deque[Sequence] = deque()
        self._requests_seen = 0

    @property
    def running(self) -> list[Sequence]:
        """Sequences in the batch that have not ended."""
        return [sequence for sequence in self._in_rows if sequence.finish_reason is None]

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue all samples of a request."""
        seed = request.parameters.seed
        for index in range(request.parameters.n):
            own = f"{self._settings.seed} {self._requests_seen} {index}" if seed is None else seed + index
            request.sequences.append(Sequence(request, Random(own)))  # noqa: S311 - samples, no secrets
        self._requests_seen += 1
        self._waiting.extend(request.sequences)

    def step(self, *, admit: bool) -> list[Request]:
        """Start waiting sequences (if `admit`) and give every running one its next token.

        Returns:
            The requests that ended.
        """
        running = self.running
        if running:
            logits = self._decode(running)
            self._append(running, logits)
        ended = running
        if admit:
            ended = ended + self._admit()
        return [request for request in dict.fromkeys(s.request for s in ended) if request.finished]

    def abort(self, request: Request | None = None) -> list[Request]:
        """End one request, or all, running and waiting, with what they have; return the ended requests."""
        ended = [s for s in (*self.running, *self._waiting) if request is None or s.request is request]
        for sequence in ended:
            sequence.finish_reason = "abort"
            sequence.text = self._codec.text(sequence)
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._take_out_ended()
        return list(dict.fromkeys(sequence.request for sequence in ended))

    def preempt(self) -> None:
        """Put all running sequences back into the queue without their keys, which are computed anew."""
        self._waiting.extendleft(reversed(self.running))
        self._in_rows, self._rows = [], None

    def drop_all(self) -> list[Request]:
        """Forget everything after a failure; return the requests that were lost by it."""
        lost = list(dict.fromkeys(s.request for s in (*self._in_rows, *self._waiting)))
        self._in_rows, self._rows = [], None
        self._waiting.clear()
        return lost

    def _decode(self, running: list[Sequence]) -> torch.Tensor:
        """Give every row its last token; return the next logits of the running ones."""
        if (len(self._in_rows) - len(running)) * _ENDED_SHARE >= len(self._in_rows):
            self._take_out_ended()
        assert self._rows is not None  # noqa: S101 - something runs
        logits = self._model.decode(self._rows, [sequence.output_ids[-1] for sequence in self._in_rows])
        return logits[[sequence.finish_reason is None for sequence in self._in_rows]]

    def _take_out_ended(self) -> None:
        kept = [row for row, sequence in enumerate(self._in_rows) if sequence.finish_reason is None]
        if len(kept) == len(self._in_rows):
            return
        self._in_rows = [self._in_rows[row] for row in kept]
        if self._rows is not None and kept:
            self._rows.select(kept)
        else:
            self._rows = None

    def _admit(self) -> list[Sequence]:
        """Compute the prompts of waiting sequences that fit, and their first tokens."""
        admitted: list[Sequence] = []
        prompts: dict[tuple[int, ...], int] = {}  # samples of one request share one
        running = self.running
        longest = max((sequence.request.longest for sequence in running), default=0)
        longest_prompt = 0
        while self._waiting:
            candidate = self._waiting[0]
            rows = len(running) + len(admitted) + 1
            longest = max(longest, candidate.request.longest)
            too_much = rows * longest > self._settings.max_cached_tokens
            if rows > self._settings.max_num_seqs or (too_much and rows > 1):
                break
            prompt = tuple(candidate.token_ids())
            longest_prompt = max(longest_prompt, len(prompt))
            if admitted and (len(prompts | {prompt: 0})) * longest_prompt > _PREFILL_TOKENS:
                break
            prompts.setdefault(prompt, len(prompts))
            admitted.append(self._waiting.popleft())
        if admitted:
            self._start(admitted, prompts)
        return admitted

    def _start(self, sequences: list[Sequence], prompts: dict[tuple[int, ...], int]) -> None:
        self._take_out_ended()
        self._in_rows.extend(sequences)
        for request in dict.fromkeys(sequence.request for sequence in sequences):
            if request.parameters.prompt_logprobs is not None and request.prompt_scores is None:
                request.prompt_scores = self._model.score(
                    request.prompt_ids, request.parameters.prompt_logprobs
                )
        rows, logits = self._model.prefill([list(prompt) for prompt in prompts])
        owners = [prompts[tuple(sequence.token_ids())] for sequence in sequences]
        rows.select(owners)
        if self._rows is None:
            self._rows = rows
        else:
            self._rows.append(rows)
        self._append(sequences, logits[owners])

    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Sample the next token of each sequence from its row of `logits` [N, V]."""
        sampled = sample(
            logits,
            [sequence.request.parameters for sequence in sequences],
            [sequence.random.random() for sequence in sequences],
        )
        if not all(map(math.isfinite, sampled.logprobs)):
            raise EngineFailure("the model's output is not finite: the weights being served are damaged")
        for number, sequence in enumerate(sequences):
            sequence.output_ids.append(sampled.token_ids[number])
            sequence.logprobs.append(sampled.logprobs[number])
            sequence.top_logprobs.append(sampled.top[number])
            self._codec.finish(sequence)
