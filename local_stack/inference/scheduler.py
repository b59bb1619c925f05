"""Which sequences run: queue, rows of the pool, and one step of generation.

Iteration-level batching (Orca, Yu et al., 2022): before every step, waiting sequences that fit join the
running ones; finished ones leave at once. Runs inside the engine's thread; knows nothing of threads or HTTP.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch

from local_stack.inference.errors import EngineFailure
from local_stack.inference.packed_model import PackedModel
from local_stack.inference.prefilling import Prompt, prefill
from local_stack.inference.randomness import derive_seed, uniforms
from local_stack.inference.sampling import sample
from local_stack.inference.sequences import GenerationRequest, Sequence
from local_stack.inference.settings import EngineSettings
from local_stack.inference.stopping import StopRules

_PREFILL_TOKENS_PER_STEP = 2048
"""About how many prompt tokens are started in one step, so that running sequences are not held up long."""


class Scheduler:
    """Queue and batch of sequences.

    Args:
        model: The model to run.
        rules: When sequences end.
        settings: Limits and the seed.
        finished: Called with every request whose last sequence has ended; perhaps more than once.
    """

    def __init__(
        self,
        model: PackedModel,
        rules: StopRules,
        settings: EngineSettings,
        finished: Callable[[GenerationRequest], None],
    ) -> None:
        self._model = model
        self._rules = rules
        self._settings = settings
        self._finished = finished
        self._pool = model.new_pool()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # number in the list = row of the pool
        self._requests_seen = 0

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def add(self, request: GenerationRequest) -> None:
        """Queue all samples of a request."""
        parameters = request.parameters
        for index in range(parameters.n):
            if parameters.seed is None:
                seed = derive_seed(self._settings.seed, self._requests_seen, index)
            else:
                seed = derive_seed(parameters.seed + index)
            request.sequences.append(Sequence(request, index, seed))
        self._requests_seen += 1
        self._waiting.extend(request.sequences)

    def step(self, *, admit: bool) -> None:
        """Start waiting sequences (if `admit`), then give every running one its next token."""
        if admit:
            self._admit()
        if self._running:
            self._pool.reserve(max(self._pool.lengths) + 1)
            logits = self._model.decode(self._pool, [sequence.output_ids[-1] for sequence in self._running])
            self._append(self._running, logits)
            self._retire()

    def abort(self, request: GenerationRequest | None = None) -> None:
        """End one request, or all, running and waiting, with what they have."""
        ended = [s for s in (*self._running, *self._waiting) if request is None or s.request is request]
        for sequence in ended:
            sequence.finish_reason = "abort"
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._retire()
        for owner in dict.fromkeys(sequence.request for sequence in ended):
            self._finished(owner)  # a second report of one that also had running sequences does no harm

    def preempt(self) -> None:
        """Put all running sequences back into the queue without their keys, which are computed anew."""
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
        self._pool.release()

    def drop_all(self) -> list[GenerationRequest]:
        """Forget everything after a failure; return the requests that were lost by it."""
        lost = list(dict.fromkeys(s.request for s in (*self._running, *self._waiting)))
        self._running.clear()
        self._waiting.clear()
        self._pool.release()
        return lost

    def _admit(self) -> None:
        admitted: list[Sequence] = []
        tokens = 0
        longest = max((sequence.longest() for sequence in self._running), default=0)
        while self._waiting and tokens < _PREFILL_TOKENS_PER_STEP:
            candidate = self._waiting[0]
            rows = len(self._running) + len(admitted) + 1
            longest = max(longest, candidate.longest())
            too_much = rows * longest > self._settings.max_cached_tokens
            if rows > self._settings.max_num_seqs or (too_much and rows > 1):
                break
            admitted.append(self._waiting.popleft())
            if len(admitted) == 1 or candidate.request is not admitted[-2].request:
                tokens += len(candidate.cached_ids())
        if admitted:
            self._start(admitted)

    def _start(self, sequences: list[Sequence]) -> None:
        rows = self._pool.add_rows(len(sequences))
        self._running.extend(sequences)
        self._pool.reserve(max(len(sequence.cached_ids()) for sequence in sequences))
        prompts = []
        for row, sequence in zip(rows, sequences, strict=True):
            fresh = not sequence.output_ids and sequence.request.prompt_scores is None
            score = sequence.request.parameters.prompt_logprobs if fresh else None
            prompts.append(Prompt(row, sequence.cached_ids(), score))
        results = prefill(self._model, self._pool, prompts)
        fresh_ones = []
        for sequence, result in zip(sequences, results, strict=True):
            if result.scores is not None:
                sequence.request.prompt_scores = result.scores
            if not sequence.output_ids:
                fresh_ones.append((sequence, result.logits))
        if fresh_ones:
            self._append([s for s, _ in fresh_ones], torch.stack([logits for _, logits in fresh_ones]))
            self._retire()

    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Sample the next token of each sequence from its row of `logits` [N, V]."""
        parameters = [sequence.request.parameters for sequence in sequences]
        numbers = uniforms([s.seed for s in sequences], [len(s.output_ids) for s in sequences])
        forbidden = [self._rules.forbidden(sequence) for sequence in sequences]
        sampled = sample(logits, parameters, numbers, forbidden, self._settings.logprobs_mode)
        if not all(map(math.isfinite, sampled.logprobs)):
            raise EngineFailure("the model's output is not finite: the weights being served are damaged")
        for number, sequence in enumerate(sequences):
            sequence.output_ids.append(sampled.token_ids[number])
            sequence.logprobs.append(sampled.logprobs[number])
            sequence.top_logprobs.append(sampled.top[number])
            self._rules.apply(sequence)

    def _retire(self) -> None:
        """Free the rows of sequences that have ended; report requests that are complete."""
        complete: list[GenerationRequest] = []
        for row in reversed(range(len(self._running))):
            sequence = self._running[row]
            if sequence.finish_reason is None:
                continue
            self._pool.remove(row)
            last = self._running.pop()
            if last is not sequence:
                self._running[row] = last
            if sequence.request.finished:
                complete.append(sequence.request)
        for request in dict.fromkeys(complete):
            self._finished(request)
