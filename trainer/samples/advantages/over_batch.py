"""Second halves of estimators: what is taken over the whole batch, once each group has its advantages.

A batch is one optimizer step, and every process has all of it: nothing here depends on how the step is cut
into micro-batches or spread over processes. Sums do not depend on the order of groups or sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.extensions import GroupScores
from trainer.options import Options, StdOptions

_WHITENING_EPSILON = 1e-8
"""Added to the variance, as verl does: a batch of equal advantages becomes zeros."""

_BATCH_STD_EPSILON = 1e-6
"""Added to the standard deviation of a batch's scores, as a share of the largest."""


def whiten_tokens(
    groups: Sequence[GroupScores], advantages: Sequence[Sequence[float]], options: Options
) -> list[list[float]]:
    """Subtract the mean over the batch's trained tokens, divide by ``sqrt(variance + 1e-8)``.

    The variance's sum of squares is divided by n - 1. With one trained token or none, advantages stay.
    """
    of_sequences = [advantage for of_group in advantages for advantage in of_group]
    tokens = [count for group in groups for count in group.trained_tokens]
    total = sum(tokens)
    if total < 2:
        return [list(of_group) for of_group in advantages]
    mean = math.fsum(n * value for n, value in zip(tokens, of_sequences, strict=True)) / total
    squares = math.fsum(n * (value - mean) ** 2 for n, value in zip(tokens, of_sequences, strict=True))
    divisor = math.sqrt(squares / (total - 1) + _WHITENING_EPSILON)
    return [[(value - mean) / divisor for value in of_group] for of_group in advantages]


def scale_by_nonzero_share(
    groups: Sequence[GroupScores], advantages: Sequence[Sequence[float]], options: Options
) -> list[list[float]]:
    """Multiply by the number of sequences over that of those with a score other than 0."""
    scores = [score for group in groups for score in group.scores]
    factor = len(scores) / max(1, sum(score != 0 for score in scores))
    return [[factor * value for value in of_group] for of_group in advantages]


def divide_by_batch_std(
    groups: Sequence[GroupScores], advantages: Sequence[Sequence[float]], options: StdOptions
) -> list[list[float]]:
    """Divide by ``std + 1e-6 * max|score|`` over the batch's scores; zeros stay where there is no spread."""
    scores = [score for group in groups for score in group.scores]
    largest = max(map(abs, scores))
    divided_by = len(scores) - (options.std == "n-1")
    if not largest or not divided_by:
        return [list(of_group) for of_group in advantages]
    mean = math.fsum(scores) / len(scores)
    squares = math.fsum((score - mean) ** 2 for score in scores)
    divisor = math.sqrt(squares / divided_by) + _BATCH_STD_EPSILON * largest
    return [[value / divisor for value in of_group] for of_group in advantages]
