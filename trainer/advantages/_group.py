"""From one scored group to one advantage per token."""

from __future__ import annotations

from collections.abc import Sequence

from schemas import IGNORE_INDEX, ScoredGroup
from trainer.advantages._estimators import EstimatorName, resolve_estimator


def sequence_advantages(group: ScoredGroup, *, estimator: EstimatorName) -> list[float]:
    """One advantage per sequence, from the group's scores.

    ``overrides[i]["set_advantage_to_zero"]`` takes effect last: that sequence's score stays part of its
    siblings' baseline, and they are compared with what really happened.

    Args:
        group: A validated group of n sequences.
        estimator: How scores become advantages.

    Returns:
        ``[n]``; exact zeros where the group has no spread (except under ``raw``).

    Raises:
        ConfigurationError: if there is no such estimator.
        DataError: if a score is not finite.
    """
    advantages = resolve_estimator(estimator)(group.scores)
    return [0.0 if _is_set_to_zero(group, index) else advantage for index, advantage in enumerate(advantages)]


def token_advantages(group: ScoredGroup, *, estimator: EstimatorName) -> list[list[float]]:
    """One advantage per token, token-aligned.

    The group's own token-level ``advantages`` win; else each sequence's advantage is given to each of its
    trained tokens.

    Example: scores ``[1.0, 0.0]`` under ``group_center``, the first token of each sequence a prompt::

        masks    [[-100, 31,  2 ], [-100,  45,   2 ]]
        returns  [[ 0.0, 0.5, 0.5], [ 0.0, -0.5, -0.5]]

    Args:
        group: A validated group of n sequences.
        estimator: How scores become advantages where the group has no token-level ones.

    Returns:
        ``[n][T]``, each row as long as its sequence; 0.0 where the mask is -100, and in the whole of a
        sequence whose override sets its advantage to zero.

    Raises:
        ConfigurationError: if there is no such estimator.
        DataError: if a score is not finite.
    """
    if group.advantages is None:
        per_sequence = sequence_advantages(group, estimator=estimator)
        return [
            [0.0 if entry == IGNORE_INDEX else advantage for entry in mask]
            for mask, advantage in zip(group.masks, per_sequence, strict=True)
        ]
    return [
        [0.0] * len(mask)
        if _is_set_to_zero(group, index)
        else [
            0.0 if entry == IGNORE_INDEX else float(advantage)
            for entry, advantage in zip(mask, row, strict=True)
        ]
        for index, (mask, row) in enumerate(zip(group.masks, group.advantages, strict=True))
    ]


def has_signal(advantages: Sequence[Sequence[float]]) -> bool:
    """Whether any token of a group has an advantage other than zero.

    A group without one has no gradient but that of a KL penalty: without a penalty it can be skipped, as
    long as its trained tokens stay in the step's denominator.
    """
    return any(any(row) for row in advantages)


def _is_set_to_zero(group: ScoredGroup, index: int) -> bool:
    override = group.overrides[index] if group.overrides is not None else None
    return bool(override and override.get("set_advantage_to_zero", False))
