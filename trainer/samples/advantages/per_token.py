"""From scored groups to one advantage per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from schemas import IGNORE_INDEX, ScoredGroup
from trainer.extensions import BoundEstimator, GroupScores


def sequence_advantages(group: ScoredGroup, *, estimator: BoundEstimator) -> list[float]:
    """One advantage per sequence, from the group's scores, before anything is taken over the batch.

    ``overrides[i]["set_advantage_to_zero"]`` takes effect last: that sequence's score stays part of its
    siblings' baseline, and they are compared with what really happened. Where ``overrides[i]["sft"]`` or
    ``group_overrides["sft"]`` asks for plain supervised fine-tuning, the score itself is the advantage.

    Args:
        group: A validated group of n sequences.
        estimator: How scores become advantages.

    Returns:
        ``[n]``; exact zeros where the group has no spread (except under ``raw`` and ``length_shaping``).

    Raises:
        ConfigurationError: if the estimator returns anything but one number per sequence.
        DataError: if a score is not finite, or the estimator cannot take the scores.
    """
    return _with_overrides(group, estimator(_scores_of(group)))


def _scores_of(group: ScoredGroup) -> GroupScores:
    """The facts of a group that an estimator sees."""
    return GroupScores(scores=group.scores, trained_tokens=_trained_tokens(group))


def _with_overrides(group: ScoredGroup, advantages: Sequence[float]) -> list[float]:
    """Let a group's overrides take effect on the advantages of its n sequences."""
    return [
        0.0 if is_set_to_zero(group, index) else score if is_supervised(group, index) else advantage
        for index, (score, advantage) in enumerate(zip(group.scores, advantages, strict=True))
    ]


def _batch_advantages(groups: Sequence[ScoredGroup], estimator: BoundEstimator) -> Iterator[list[float]]:
    """Yield the advantages of each group's sequences, the estimator having seen the whole batch.

    A sequence with token-level advantages is worth 1 here, or 0 if it is set to zero.
    """
    estimated = iter(estimator.of_batch([_scores_of(group) for group in groups if group.advantages is None]))
    for group in groups:
        if group.advantages is None:
            yield _with_overrides(group, next(estimated))
        else:
            yield [float(not is_set_to_zero(group, index)) for index in range(group.sequence_count)]


def token_advantages(groups: Sequence[ScoredGroup], *, estimator: BoundEstimator) -> Tensor:
    """One advantage per token of a batch, token-aligned.

    A group's own token-level ``advantages`` win; else each sequence's advantage is given to each of its
    trained tokens.

    Example: scores ``[1.0, 0.0]`` under ``group_center``, the first token of each sequence a prompt::

        masks    [[-100, 31,  2 ], [-100,  45,   2 ]]
        returns  [  0.0, 0.5, 0.5,   0.0, -0.5, -0.5]

    Args:
        groups: Validated groups, the whole batch, N tokens in all.
        estimator: How scores become advantages where a group has no token-level ones.

    Returns:
        ``[N]`` float32, the sequences of all groups one after another; 0.0 where the mask is -100, and in
        the whole of a sequence whose override sets its advantage to zero.

    Raises:
        ConfigurationError: if the estimator returns anything but one number per sequence.
        DataError: if a score is not finite, or the estimator cannot take the scores of a group.
    """
    per_sequence = [each for of_group in _batch_advantages(groups, estimator) for each in of_group]
    lengths = torch.tensor([length for group in groups for length in group.flat.lengths], dtype=torch.int64)
    advantages = torch.tensor(per_sequence, dtype=torch.float32).repeat_interleave(lengths)
    start = 0
    for group in groups:
        end = start + sum(group.flat.lengths)
        if group.flat.advantages is not None:
            advantages[start:end] *= tensor_of([group.flat.advantages], torch.float32)
        start = end
    masks = tensor_of([group.flat.masks for group in groups], torch.int32)
    return advantages.masked_fill_(masks == IGNORE_INDEX, 0.0)


def tensor_of(parts: Sequence[bytes], dtype: torch.dtype) -> Tensor:
    """Make one tensor of the memory of several, e.g. a field of `schemas.FlatGroup` over groups.

    Args:
        parts: Together [N] items.
        dtype: Of the items.
    """
    memory = bytearray().join(parts)  # writable, as torch wants it
    return torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)


def has_signal(advantages: Tensor) -> bool:
    """Return True if any token of a group has an advantage other than zero.

    A group without one has no gradient but that of a KL penalty: without a penalty it can be skipped, as
    long as its trained tokens stay in the step's denominator.
    """
    return bool(advantages.any())


def _trained_tokens(group: ScoredGroup) -> list[int]:
    """Count the trained tokens of each sequence, without its first: nothing predicts that."""
    trained = np.frombuffer(group.flat.masks, dtype=np.int32) != IGNORE_INDEX
    ends = list(accumulate(group.flat.lengths))
    return [int(np.count_nonzero(trained[start + 1 : end])) for start, end in pairwise([0, *ends])]


def is_supervised(group: ScoredGroup, index: int) -> bool:
    """Return True if the environment asks for plain fine-tuning on a sequence."""
    override = group.overrides[index] if group.overrides is not None else {}
    return override.get("sft") is True or (group.group_overrides or {}).get("sft") is True


def is_set_to_zero(group: ScoredGroup, index: int) -> bool:
    """Return True if the environment asks that a sequence has no advantage."""
    override = group.overrides[index] if group.overrides is not None else None
    return bool(override and override.get("set_advantage_to_zero", False))
