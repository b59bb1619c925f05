"""A teacher's words on the tokens of a group: its candidates at each position and their log-probs.

Environments send `distill_token_ids` and `distill_logprobs` [n][T][k], token-aligned, as vLLM's
`prompt_logprobs` are: candidates at position t are for token t, given those before it. k differs from
position to position, and is 0 where nothing was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas import IGNORE_INDEX, LOGPROB_SLACK, ScoredGroup
from trainer.config import DistillationSettings

NO_TOKEN = -1
"""Id in place of a candidate that there is not; its log-prob is minus infinity."""


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """A teacher's candidates for the T tokens of one sequence."""

    token_ids: Tensor
    """[T, K] int64, `NO_TOKEN` beyond a position's own candidates."""
    logprobs: Tensor
    """[T, K] float32, minus infinity there."""

    def hold(self, tokens: Sequence[int]) -> Tensor:
        """Return for each of T tokens whether it is among its candidates, [T] bool."""
        return (self.token_ids == torch.tensor(tokens)[:, None]).any(dim=1)


def teacher_rows(group: ScoredGroup) -> list[TeacherRows]:
    """Give the candidates of each sequence of a group as tensors; an empty list if it has none."""
    pairs = zip(group.distill_token_ids or [], group.distill_logprobs or [], strict=True)
    return [
        TeacherRows(
            token_ids=torch.from_numpy(_rectangle(ids, NO_TOKEN, np.int64)),
            logprobs=torch.from_numpy(_rectangle(logprobs, -np.inf, np.float32)),
        )
        for ids, logprobs in pairs
    ]


def sampled_token_logprobs(group: ScoredGroup, candidates: Sequence[TeacherRows]) -> Tensor:
    """Return the teacher's log-prob of each token of a group, [N] float32, one sequence after another.

    Minus infinity where the token is not among the candidates.
    """
    found = []
    for tokens, rows in zip(group.tokens, candidates, strict=True):
        is_sampled = rows.token_ids == torch.tensor(tokens)[:, None]
        found.append(rows.logprobs.masked_fill(~is_sampled, -torch.inf).amax(dim=1))
    return torch.cat(found)


def share_without_sampled_token(groups: Sequence[tuple[ScoredGroup, Sequence[TeacherRows]]]) -> float:
    """Return the share of the groups' trained tokens that are not among the teacher's candidates for them."""
    lacking = total = 0
    for group, candidates in groups:
        for tokens, masks, rows in zip(group.tokens, group.masks, candidates, strict=True):
            trained = _trained(masks)
            lacking += int((trained & ~rows.hold(tokens)).sum())
            total += int(trained.sum())
    return lacking / total if total else 0.0


def teacher_reason(
    group: ScoredGroup,
    candidates: Sequence[TeacherRows],
    settings: DistillationSettings,
    *,
    vocabulary_size: int,
) -> str | None:
    """Say why a group with these candidates cannot be distilled from; None if it can, or is not to be."""
    if settings.mode == "none":
        return None
    if group.distill_token_ids is None:
        return (
            f"no distill_token_ids, which distillation.mode {settings.mode} needs: let the environment send "
            "them, or set distillation.mode none"
        )
    if settings.mode == "sampled_token" and group.inference_logprobs is None:
        return "no inference_logprobs, which distillation.mode sampled_token compares the teacher's with"
    for index, (tokens, masks, rows) in enumerate(zip(group.tokens, group.masks, candidates, strict=True)):
        reason = _reason_of_sequence(index, tokens, masks, rows, settings.mode, vocabulary_size)
        if reason is not None:
            return reason
    return None


def _reason_of_sequence(
    index: int,
    tokens: Sequence[int],
    masks: Sequence[int],
    rows: TeacherRows,
    mode: str,
    vocabulary_size: int,
) -> str | None:
    trained = _trained(masks)
    ids, known = rows.token_ids, rows.token_ids != NO_TOKEN
    ordered = ids.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)).any(dim=1)
    faults = {
        "is empty at a trained token": ~known.any(dim=1),
        f"names a token outside the model's vocabulary of {vocabulary_size}": (ids >= vocabulary_size).any(1),
        "names a token twice": twice,
        "has a log-prob above 0 beside it": (known & (rows.logprobs > LOGPROB_SLACK)).any(dim=1),
        "has probabilities beside it that add up to more than 1": rows.logprobs.exp().sum(dim=1) > 1.01,
    }
    if mode == "sampled_token":
        faults["lacks the sampled token, whose log-prob distillation.mode sampled_token needs"] = ~rows.hold(
            tokens
        )
    if mode == "reverse_kl":
        # Renormalised over one candidate both distributions are 1: no divergence, and no gradient.
        faults[
            "has one candidate at a trained token; distillation.mode reverse_kl needs at least two, "
            "forward_kl and sampled_token take one"
        ] = known.sum(dim=1) < 2
    for what, where in faults.items():
        if bool((where & trained).any()):
            return f"distill_token_ids[{index}][{int((where & trained).nonzero()[0])}] {what}"
    return None


def _trained(masks: Sequence[int]) -> Tensor:
    trained = torch.tensor(masks) != IGNORE_INDEX
    trained[0] = False  # nothing predicts it
    return trained


def _rectangle(rows: Sequence[Sequence[float]], filler: float, dtype: type) -> NDArray[Any]:
    """[T][k] numbers as [T, K] with K the largest k, at least 1."""
    counts: NDArray[np.int64] = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    result: NDArray[Any] = np.full((len(rows), max(1, int(counts.max(initial=0)))), filler, dtype=dtype)
    numbers: NDArray[Any] = np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(counts.sum()))
    result[np.arange(result.shape[1]) < counts[:, None]] = numbers
    return result
