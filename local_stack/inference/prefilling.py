"""Computing the prompts of newly arrived sequences, each shared part once.

Samples of one request have one prompt, and prompts of one environment often begin alike (system message).
Among the sequences that start together, equal prompts are computed once, and so is a common beginning; the
results are copied. Nothing is kept for later, so new weights can never meet keys of old ones here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from itertools import takewhile

import torch

from local_stack.inference.attention import Piece
from local_stack.inference.kv_pool import KeyValuePool
from local_stack.inference.packed_model import PackedModel
from local_stack.inference.sequences import ScoredPromptToken

_TOKENS_PER_FORWARD = 512
"""Most tokens in one forward, so that a long prompt needs no huge intermediate tensors."""
_SCORED_TOKENS_PER_FORWARD = 128
"""Fewer where every position needs logits: 128 x 150,000 float32 are 77 MB."""
_SHORTEST_SHARED_BEGINNING = 16
"""Below this, a forward of its own costs more than it saves."""


@dataclass(frozen=True)
class Prompt:
    """One sequence to compute."""

    row: int
    token_ids: list[int]
    score: int | None
    """None: only the last position's logits; k: score every token, with the k likeliest alternatives."""


@dataclass
class Prefilled:
    """Outcome for one prompt."""

    logits: torch.Tensor
    """[V] float32 of the last position: the prediction of the first new token."""
    scores: list[ScoredPromptToken | None] | None


def prefill(model: PackedModel, pool: KeyValuePool, prompts: ListLike[Prompt]) -> list[Prefilled]:
    """Compute all prompts; their rows are empty before and hold them whole afterwards."""
    leaders: dict[tuple[int | None, tuple[int, ...]], Prompt] = {}
    for prompt in prompts:
        leaders.setdefault((prompt.score, tuple(prompt.token_ids)), prompt)
    shared = _compute_shared_beginning(model, pool, [p for p in leaders.values() if p.score is None])
    results: dict[int, Prefilled] = {}
    for batch in _batches(leaders.values(), shared):
        _run(model, pool, batch, results)
    for key, leader in leaders.items():
        followers = [p.row for p in prompts if p is not leader and (p.score, tuple(p.token_ids)) == key]
        if followers:
            pool.copy_columns(leader.row, followers, len(leader.token_ids))
            results.update(dict.fromkeys(followers, results[leader.row]))
    return [results[prompt.row] for prompt in prompts]


def _compute_shared_beginning(model: PackedModel, pool: KeyValuePool, prompts: list[Prompt]) -> int:
    """Compute what all prompts begin with, once; return its length (0: nothing worth sharing).

    At least one token of every prompt is left, because its logits are needed.
    """
    if len(prompts) < 2:
        return 0
    columns = zip(*(prompt.token_ids[:-1] for prompt in prompts), strict=False)
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    if shared < _SHORTEST_SHARED_BEGINNING:
        return 0
    first, *others = prompts
    for start in range(0, shared, _TOKENS_PER_FORWARD):
        stop = min(start + _TOKENS_PER_FORWARD, shared)
        model.prefill(pool, [Piece(first.row, start, stop)], [first.token_ids[start:stop]], [])
    pool.copy_columns(first.row, [prompt.row for prompt in others], shared)
    return shared


def _batches(prompts: Iterable[Prompt], shared: int) -> Iterator[list[tuple[Prompt, Piece]]]:
    """Cut the prompts into pieces and group these into forwards of limited size, in order."""
    batch: list[tuple[Prompt, Piece]] = []
    room = _TOKENS_PER_FORWARD
    for prompt in prompts:
        start = 0 if prompt.score is not None else shared
        while start < len(prompt.token_ids):
            most = room if prompt.score is None else min(room, _SCORED_TOKENS_PER_FORWARD)
            stop = min(start + most, len(prompt.token_ids))
            batch.append((prompt, Piece(prompt.row, start, stop)))
            room -= stop - start
            start = stop
            if room == 0 or prompt.score is not None:
                yield batch
                batch, room = [], _TOKENS_PER_FORWARD
    if batch:
        yield batch


def _run(
    model: PackedModel,
    pool: KeyValuePool,
    batch: list[tuple[Prompt, Piece]],
    results: dict[int, Prefilled],
) -> None:
    """Run one forward and file its logits under the prompts' rows."""
    wanted: list[list[int]] = []
    first = 0
    for prompt, piece in batch:
        last = first + piece.stop - piece.start
        if prompt.score is not None:
            wanted.append(list(range(first, last)))
        else:
            wanted.append([last - 1] if piece.stop == len(prompt.token_ids) else [])
        first = last
    token_ids = [prompt.token_ids[piece.start : piece.stop] for prompt, piece in batch]
    logits = model.prefill(
        pool, [piece for _, piece in batch], token_ids, [i for group in wanted for i in group]
    )
    parts = torch.split(logits, [len(group) for group in wanted])
    for (prompt, piece), part in zip(batch, parts, strict=True):
        if prompt.score is None:
            if len(part):
                results[prompt.row] = Prefilled(part[-1], None)
            continue
        previous = results.get(prompt.row)
        scores = (previous.scores if previous else None) or [None]
        following = prompt.token_ids[piece.start + 1 : piece.stop + 1]
        scores.extend(_score(part[: len(following)], following, prompt.score))
        results[prompt.row] = Prefilled(part[-1].clone(), scores)


def _score(logits: torch.Tensor, token_ids: list[int], top: int) -> list[ScoredPromptToken]:
    """Log-prob and rank of each token under its row of logits. [P, V], [P]."""
    chosen = logits.gather(1, torch.tensor(token_ids, dtype=torch.int64)[:, None])  # [P, 1]
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    ranks = (logits > chosen).sum(dim=-1).add_(1).tolist()
    logprobs = (chosen - normalizer)[:, 0].tolist()
    values, ids = logits.topk(top, dim=-1)
    pairs = zip(ids.tolist(), (values - normalizer).tolist(), strict=True)
    tops = [list(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
    return [ScoredPromptToken(*entry) for entry in zip(token_ids, logprobs, ranks, tops, strict=True)]
