"""From the n scores of a group to n advantages: pure functions, float64 throughout.

The relative estimators (all but ``raw``) compare a sequence with its siblings. In a group without spread,
and so in a group of one, they answer exact zeros: there is nothing to learn from a comparison of equals.
Those that look at the whole batch do so in a second half, see :mod:`trainer.samples.advantages.over_batch`.
All raise DataError if a group has no score, or one that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.errors import DataError
from trainer.extensions import GroupScores, advantage_estimator
from trainer.options import LengthShapingOptions, Options, StdOptions
from trainer.samples.advantages.over_batch import (
    divide_by_batch_std,
    scale_by_nonzero_share,
    whiten_tokens,
)

RELATIVE_EPSILON = 1e-6
"""Differences below this share of the largest score count as none.

Scores arrive as the sum of float arithmetic, often in float32 (resolution 6e-8), in which the same reward can
come out different in its last digits. A group that differs only there must not be blown up to advantages of
±1, whatever unit its scores are in; an absolute epsilon would do that for large scores and erase small ones.
"""

_PASS_AT_K_EPSILON = 1e-6
"""Added to the standard deviation by pass@k, as verl does."""


def has_spread(scores: Sequence[float]) -> bool:
    """Return True if a group's scores differ by more than ``RELATIVE_EPSILON`` of the largest magnitude.

    Speaks of scores only: a group with token-level advantages, or under ``raw``, may have something to teach
    without it. :func:`has_signal` asks the advantages.

    Raises:
        DataError: if there is no score, or one that is not finite.
    """
    scaled, _ = _scaled(scores)
    return max(scaled) - min(scaled) > RELATIVE_EPSILON * _magnitude(scaled)


@advantage_estimator(StdOptions)
def group_norm(group: GroupScores, options: StdOptions) -> list[float]:
    """GRPO: ``(score - mean) / (std + 1e-6 * max|score|)``, std over the group itself.

    Source: Shao et al. 2024, DeepSeekMath, section 4.1.2. No advantage exceeds ``sqrt(n - 1)``.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    scaled, _ = _scaled(group.scores)
    deviations = _deviations(scaled)
    divided_by = len(deviations) - (options.std == "n-1")
    spread = math.sqrt(math.fsum(value * value for value in deviations) / divided_by)
    divisor = spread + RELATIVE_EPSILON * _magnitude(scaled)
    return [value / divisor for value in deviations]


@advantage_estimator()
def group_center(group: GroupScores, options: Options) -> list[float]:
    """Dr. GRPO: ``score - mean``, in the unit of the scores.

    Without the division, easy and hard groups do not count for more than mixed ones. Source: Liu et al. 2025,
    "Understanding R1-Zero-Like Training".
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    scaled, unit = _scaled(group.scores)
    return [value * unit for value in _deviations(scaled)]


@advantage_estimator()
def leave_one_out(group: GroupScores, options: Options) -> list[float]:
    """RLOO: ``score - mean of the other scores``, which is ``n / (n - 1) * (score - mean)``.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    count = len(group.scores)
    return [value * count / (count - 1) for value in group_center(group)]


@advantage_estimator()
def raw(group: GroupScores, options: Options) -> list[float]:
    """The scores as they are: for environments that send advantages, or weights of fine-tuning, as scores."""
    _refuse_unusable(group.scores)
    return [float(score) for score in group.scores]


@advantage_estimator()
def opo(group: GroupScores, options: Options) -> list[float]:
    """OPO: ``score - sum(n * score) / sum(n)``, n the trained tokens of each sequence.

    The baseline with the least variance if every token's gradient has the same. Source: Hao et al. 2025,
    arXiv 2505.23585.
    """
    tokens = math.fsum(group.trained_tokens)
    if not has_spread(group.scores) or not tokens:
        return [0.0] * len(group.scores)
    scaled, unit = _scaled(group.scores)
    weighted = math.fsum(n * value for n, value in zip(group.trained_tokens, scaled, strict=True))
    return [(value - weighted / tokens) * unit for value in scaled]


@advantage_estimator()
def pass_at_k(group: GroupScores, options: Options) -> list[float]:
    """Pass@k: the best sequence gets ``(best - second best) / (std + 1e-6)``, all others 0.

    The standard deviation is over the group, its sum of squares divided by n - 1. A tie for the best gives
    zeros. Source: Walder and Karkhanis 2025, arXiv 2503.19595.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    deviations = _deviations(group.scores)
    spread = math.sqrt(math.fsum(value * value for value in deviations) / (len(deviations) - 1))
    second, best = sorted(group.scores)[-2:]
    advantage = (best - second) / (spread + _PASS_AT_K_EPSILON)
    return [advantage if score == best else 0.0 for score in group.scores]


@advantage_estimator()
def maxrl(group: GroupScores, options: Options) -> list[float]:
    """MaxRL: ``(score - mean) / mean``, for scores that count successes.

    Weighs a prompt by the inverse of how often it is solved, as maximum likelihood would. Source: arXiv
    2602.02710.

    Raises:
        DataError: The scores differ and their mean is not above 0, so that dividing by it means nothing.
    """
    if not has_spread(group.scores):
        return [0.0] * len(group.scores)
    scaled, _ = _scaled(group.scores)
    mean = math.fsum(scaled) / len(scaled)
    if mean <= RELATIVE_EPSILON * _magnitude(scaled):
        raise DataError(
            f"the mean of the group's scores is {math.fsum(group.scores) / len(group.scores):g}, and maxrl "
            "divides by it: let the environment score failures 0 and successes 1, or set another "
            "data.advantage_estimator"
        )
    return [value / mean for value in _deviations(scaled)]


@advantage_estimator(LengthShapingOptions)
def length_shaping(group: GroupScores, options: LengthShapingOptions) -> list[float]:
    """Centred scores less a price for length: ``s - mean`` of ``s = score - mean * weight * n / max(n)``.

    n are the trained tokens of a sequence. The price grows with the group's mean score, so that a prompt is
    answered briefly once it is answered well; with a mean of 0 or less there is none. Sequences of equal
    score and unequal length differ.
    """
    scaled, unit = _scaled(group.scores)
    longest = max(group.trained_tokens)
    price = options.weight * max(0.0, math.fsum(scaled) / len(scaled)) / max(1, longest)
    shaped = [value - price * tokens for value, tokens in zip(scaled, group.trained_tokens, strict=True)]
    if not has_spread(shaped):
        return [0.0] * len(shaped)
    return [value * unit for value in _deviations(shaped)]


@advantage_estimator(over_batch=whiten_tokens)
def reinforce_plus_plus_baseline(group: GroupScores, options: Options) -> list[float]:
    """REINFORCE++ with baseline: ``score - mean``, then whitened over the batch's trained tokens.

    Source: Hu et al. 2025, arXiv 2501.03262.
    """
    return group_center(group)


@advantage_estimator(over_batch=scale_by_nonzero_share)
def gpg(group: GroupScores, options: Options) -> list[float]:
    """GPG: ``(score - mean) * B / m``, of the batch's B sequences m with a score other than 0.

    Source: Chu et al. 2025, arXiv 2504.02546.
    """
    return group_center(group)


@advantage_estimator(StdOptions, over_batch=divide_by_batch_std)
def batch_std(group: GroupScores, options: StdOptions) -> list[float]:
    """Lite PPO: ``(score - mean) / std``, the mean over the group, std over the scores of the batch.

    Source: Liu et al. 2025, "Tricks or Traps?", arXiv 2508.08221; TRL's ``scale_rewards: batch``.
    """
    return group_center(group)


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
