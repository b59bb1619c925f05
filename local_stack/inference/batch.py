"""Which sequences run: queue, rows of the model, and one step of generation.

Sequences that were started together are a cohort, with rows of the model of its own. Before a step, waiting
sequences become a cohort if all of them fit, or half of the rows are free: a new request need not wait for a
long one, and a long queue is not started in many small parts. Runs in the engine's thread; knows no HTTP.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from random import Random

import torch

from local_stack.inference.errors import EngineFailure
from local_stack.inference.model import Model, Rows
from local_stack.inference.records import EngineSettings, Request, Sequence
from local_stack.inference.sampling import sample
from local_stack.inference.text import TextCodec


@dataclass
class _Cohort:
    """Sequences that were started together; ended ones are taken out before the next step."""

    sequences: list[Sequence]
    rows: Rows | None = None
    """None: keys and values have to be computed, at the start or anew."""


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
        self._cohorts: list[_Cohort] = []
        self._waiting: deque[Sequence] = deque()
        self._requests_seen = 0

    @property
    def running(self) -> list[Sequence]:
        """Sequences in the batch that have not ended."""
        started = [sequence for cohort in self._cohorts for sequence in cohort.sequences]
        return [sequence for sequence in started if sequence.finish_reason is None]

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
        if admit:
            self._admit()
        running = self.running
        for cohort in self._cohorts:
            self._advance(cohort)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.sequences]
        return [request for request in dict.fromkeys(s.request for s in running) if request.finished]

    def abort(self, request: Request | None = None) -> list[Request]:
        """End one request, or all, running and waiting, with what they have; return the ended requests."""
        ended = [s for s in (*self.running, *self._waiting) if request is None or s.request is request]
        for sequence in ended:
            sequence.finish_reason = "abort"
            sequence.text = self._codec.text(sequence)
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        return list(dict.fromkeys(sequence.request for sequence in ended))

    def forget_keys(self) -> None:
        """Have the keys and values of running sequences computed anew."""
        for cohort in self._cohorts:
            cohort.rows = None

    def drop_all(self) -> list[Request]:
        """Forget everything after a failure; return the requests that were lost by it."""
        started = [sequence for cohort in self._cohorts for sequence in cohort.sequences]
        lost = list(dict.fromkeys(sequence.request for sequence in (*started, *self._waiting)))
        self._cohorts.clear()
        self._waiting.clear()
        return lost

    def _admit(self) -> None:
        free = self._settings.max_num_seqs - len(self.running)
        if self._waiting and (len(self._waiting) <= free or 2 * free >= self._settings.max_num_seqs):
            count = min(free, len(self._waiting))
            self._cohorts.append(_Cohort([self._waiting.popleft() for _ in range(count)]))

    def _advance(self, cohort: _Cohort) -> None:
        """Give each sequence of a cohort its next token."""
        kept = [row for row, sequence in enumerate(cohort.sequences) if sequence.finish_reason is None]
        if cohort.rows is not None and 0 < len(kept) < len(cohort.sequences):
            cohort.rows.select(kept)
        cohort.sequences = sequences = [cohort.sequences[row] for row in kept]
        if not sequences:
            return
        if cohort.rows is None:
            logits = self._start(cohort)
        else:
            logits = self._model.decode(cohort.rows, [sequence.output_ids[-1] for sequence in sequences])
        parameters = [sequence.request.parameters for sequence in sequences]
        sampled = sample(logits, parameters, [sequence.random.random() for sequence in sequences])
        if not all(math.isfinite(each.logprob) for each in sampled):
            raise EngineFailure("the model's output is not finite: the weights being served are damaged")
        for sequence, each in zip(sequences, sampled, strict=True):
            sequence.output_ids.append(each.token_id)
            sequence.logprobs.append(each.logprob)
            sequence.top_logprobs.append(each.top)
            self._codec.finish(sequence)

    def _start(self, cohort: _Cohort) -> torch.Tensor:
        """Compute a cohort's rows, each different text once; return the next logits [R, V]."""
        for request in dict.fromkeys(sequence.request for sequence in cohort.sequences):
            top = request.parameters.prompt_logprobs
            if top is not None and request.prompt_scores is None:
                request.prompt_scores = self._model.score(request.prompt_ids, top)
        texts = [tuple(sequence.token_ids()) for sequence in cohort.sequences]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        cohort.rows, logits = self._model.prefill([list(text) for text in numbers])
        owners = [numbers[text] for text in texts]
        cohort.rows.select(owners)
        return logits[owners]
