"""From the n scores of a group to n advantages: pure functions, float64 throughout.

The relative estimators (all but ``raw``) compare a sequence with its siblings. In a group without spread,
and so in a group of one, they answer exact zeros: there is nothing to learn from a comparison of equals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.errors import DataError
from trainer.extensions import GroupScores, Options, advantage_estimator

RELATIVE_EPSILON = 1e-6
"""Differences below this share of the largest score count as none.

Scores arrive as the sum of float arithmetic, often in float32 (resolution 6e-8), in which the same reward can
come out different in its last digits. A group that differs only there must not be blown up to advantages of
±1, whatever unit its scores are in; an absolute epsilon would do that for large scores and erase small ones.
"""


def has_spread(scores: Sequence[float]) -> bool:
    """Return True if a group's scores differ by more than ``RELATIVE_EPSILON`` of the largest magnitude.

    Speaks of scores only: a group with token-level advantages, or under ``raw``, may have something to teach
    without it. :func:`has_signal` asks the advantages.

    Raises:
        DataError: if there is no score, or one that is not finite.
    """
    scaled, _ = _scaled(scores)
    return max(scaled) - min(scaled) > RELATIVE_EPSILON * _magnitude(scaled)


@advantage_estimator()
def group_norm(group: GroupScores, options: Options) -> list[float]:
    """GRPO: ``(score - mean) / (std + 1e-6 * max|score|)``, std over the group itself (divided by n).

    Source: Shao et al. 2024, DeepSeekMath, section 4.1.2. No advantage exceeds ``sqrt(n - 1)``.

    Raises:
        DataError: if there is no score, or one that is not finite.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    scaled, _ = _scaled(group.scores)
    deviations = _deviations(scaled)
    spread = math.sqrt(math.fsum(value * value for value in deviations) / len(deviations))
    divisor = spread + RELATIVE_EPSILON * _magnitude(scaled)
    return [value / divisor for value in deviations]


@advantage_estimator()
def group_center(group: GroupScores, options: Options) -> list[float]:
    """Dr. GRPO: ``score - mean``, in the unit of the scores.

    Without the division, easy and hard groups do not count for more than mixed ones. Source: Liu et al. 2025,
    "Understanding R1-Zero-Like Training".

    Raises:
        DataError: if there is no score, or one that is not finite.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    scaled, unit = _scaled(group.scores)
    return [value * unit for value in _deviations(scaled)]


@advantage_estimator()
def leave_one_out(group: GroupScores, options: Options) -> list[float]:
    """RLOO: ``score - mean of the other scores``, which is ``n / (n - 1) * (score - mean)``.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024.

    Raises:
        DataError: if there is no score, or one that is not finite.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    count = len(group.scores)
    return [value * count / (count - 1) for value in group_center(group)]


@advantage_estimator()
def raw(group: GroupScores, options: Options) -> list[float]:
    """The scores as they are: for environments that send advantages, or weights for fine-tuning, as scores.

    Raises:
        DataError: if there is no score, or one that is not finite.
    """
    _refuse_unusable(group.scores)
    return [float(score) for score in group.scores]


def _scaled(scores: Sequence[float]) -> tuple[list[float], float]:
    """Divide by the power of two just below the largest magnitude: exact, and then no sum can overflow."""
    _refuse_unusable(scores)
    largest = _magnitude(scores)
    if largest == 0.0:
        return [0.0] * len(scores), 1.0
    unit = math.ldexp(1.0, math.frexp(largest)[1] - 1)
    return [score / unit for score in scores], unit


def _refuse_unusable(scores: Sequence[float]) -> None:
    if not scores:
        raise DataError("a group has no scores; it needs one per sequence")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise DataError(f"scores[{index}] is {score}; scores must be finite numbers")


def _magnitude(values: Sequence[float]) -> float:
    return max(abs(value) for value in values)


def _deviations(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)  # fsum: the order of a group's sequences does not matter
    return [value - mean for value in values]
