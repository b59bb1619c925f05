"""From scores to advantages: every estimator against numpy, and what a group's own wishes do to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import ScoredGroup
from trainer.errors import DataError
from trainer.extensions import (
    BUILT_IN_ESTIMATORS,
    AdvantageEstimator,
    BoundEstimator,
    GroupScores,
    Options,
    advantage_estimator,
)
from trainer.samples.advantages import (
    batch_std,
    gpg,
    group_center,
    group_norm,
    has_signal,
    has_spread,
    leave_one_out,
    length_shaping,
    maxrl,
    opo,
    pass_at_k,
    raw,
    reinforce_plus_plus_baseline,
    sequence_advantages,
    token_advantages,
)

SCORE_LISTS = [
    [1.0, 0.0],
    [1.0, 0.1, 0.0, 0.1, 1.0, 1.0, 0.1, 0.0],
    [-3.0, 5.0, 12.5],
    [1e-9, 3e-9, 2e-9],
    [1e12, 2e12, -7e12, 0.0],
]
RELATIVE = [group_norm, group_center, leave_one_out]
ZERO_WITHOUT_SPREAD = [*RELATIVE, opo, pass_at_k, maxrl, gpg, batch_std, length_shaping]

score_lists = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=16)


def bound(estimator: Any) -> BoundEstimator:
    """With its default options."""
    found: BoundEstimator = estimator.bind(estimator.options())
    return found


def rows_of(group: ScoredGroup, estimator: Any) -> list[list[float]]:
    advantages = token_advantages([group], estimator=bound(estimator))
    return [row.tolist() for row in advantages.split(group.flat.lengths)]


def make_group(**changes: Any) -> ScoredGroup:
    """Two sequences of 4 and 3 tokens with prompts of 2 and 1."""
    fields: dict[str, Any] = {
        "tokens": [[5, 6, 7, 8], [5, 9, 2]],
        "masks": [[-100, -100, 7, 8], [-100, 9, 2]],
        "scores": [1.0, 0.0],
    }
    return ScoredGroup.model_validate(fields | changes)


@pytest.mark.parametrize("scores", SCORE_LISTS)
def test_group_norm_is_the_z_score(scores: list[float]) -> None:
    values = np.array(scores)
    expected = (values - values.mean()) / (values.std() + 1e-6 * np.abs(values).max())
    np.testing.assert_allclose(group_norm(scores), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scores", SCORE_LISTS)
def test_group_center_is_the_distance_from_the_mean(scores: list[float]) -> None:
    values = np.array(scores)
    np.testing.assert_allclose(group_center(scores), values - values.mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scores", SCORE_LISTS)
def test_leave_one_out_is_the_distance_from_the_mean_of_the_others(scores: list[float]) -> None:
    expected = [score - np.mean(np.delete(scores, index)) for index, score in enumerate(scores)]
    np.testing.assert_allclose(leave_one_out(scores), expected, rtol=1e-9)


def test_raw_leaves_scores_alone_also_in_groups_of_one() -> None:
    assert raw([3.0, 3.0, -1.0]) == [3.0, 3.0, -1.0]
    assert raw([2.5]) == [2.5]


@pytest.mark.parametrize("estimator", ZERO_WITHOUT_SPREAD)
@pytest.mark.parametrize(
    "scores",
    [
        [2.5],
        [0.0, 0.0],
        [-4.0, -4.0, -4.0],
        [0.3, 0.1 + 0.2, 0.3],
        [float(np.float32(0.7)), 0.7, 0.7],
        [1e9, 1e9 + 1.0],
        [1e-12, 1e-12 * (1 + 1e-9)],
    ],
)
def test_groups_without_real_differences_get_exact_zeros(
    estimator: Callable[[list[float]], list[float]], scores: list[float]
) -> None:
    assert estimator(scores) == [0.0] * len(scores)
    assert not has_spread(scores)


def test_near_equal_scores_do_not_explode() -> None:
    just_enough = group_norm([0.5, 0.5 * (1 + 3e-6)])
    assert has_spread([0.5, 0.5 * (1 + 3e-6)])
    assert max(map(abs, just_enough)) < 1.0


def test_spread_is_relative_to_the_scores_own_unit() -> None:
    assert has_spread([1e-12, 2e-12])
    assert has_spread([0.0, 1e-30])
    assert has_spread([1e308, -1e308])


@pytest.mark.parametrize("estimator", [*ZERO_WITHOUT_SPREAD, raw, reinforce_plus_plus_baseline])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_position(
    estimator: Callable[[list[float]], list[float]], bad: float
) -> None:
    with pytest.raises(DataError, match=r"scores\[1\] is"):
        estimator([1.0, bad])


def test_a_group_without_scores_is_refused() -> None:
    with pytest.raises(DataError, match="no scores"):
        group_norm([])


@given(score_lists)
def test_relative_advantages_sum_to_zero_and_stay_bounded(scores: list[float]) -> None:
    largest = max(map(abs, scores))
    for estimator in RELATIVE:
        assert abs(math.fsum(estimator(scores))) <= 1e-9 * max(1.0, largest) * len(scores)
    assert max(map(abs, group_norm(scores))) <= math.sqrt(max(0, len(scores) - 1)) + 1e-9


@given(score_lists, st.randoms())
def test_the_order_of_sequences_does_not_matter(scores: list[float], random: Any) -> None:
    order = list(range(len(scores)))
    random.shuffle(order)
    for estimator in (*RELATIVE, raw):
        assert estimator([scores[index] for index in order]) == [estimator(scores)[index] for index in order]


@given(score_lists, st.sampled_from([1e-6, 0.5, 1000.0]))
def test_the_unit_of_the_scores_does_not_matter_to_group_norm(scores: list[float], factor: float) -> None:
    scaled = [score * factor for score in scores]
    if has_spread(scores) == has_spread(scaled):  # rounding may move a group across the line
        np.testing.assert_allclose(group_norm(scaled), group_norm(scores), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN_ESTIMATORS)
def test_each_name_finds_its_estimator(name: str) -> None:
    assert AdvantageEstimator.find(name).__name__ == name


def test_an_estimator_sees_the_scores_and_how_many_tokens_are_trained() -> None:
    seen: list[GroupScores] = []

    @advantage_estimator()
    def see(group: GroupScores, options: Options) -> list[float]:
        seen.append(group)
        return [0.0, 0.0]

    token_advantages([make_group()], estimator=bound(see))
    assert seen == [GroupScores(scores=[1.0, 0.0], trained_tokens=[2, 2])]


def test_trained_tokens_get_their_sequences_advantage_and_masked_ones_zero() -> None:
    assert rows_of(make_group(), group_center) == [
        [0.0, 0.0, 0.5, 0.5],
        [0.0, -0.5, -0.5],
    ]


def test_overrides_zero_a_sequence_after_normalization() -> None:
    group = make_group(
        tokens=[[5, 6]] * 4,
        masks=[[-100, 6]] * 4,
        scores=[1.0, 1.0, 0.0, 0.0],
        overrides=[{"set_advantage_to_zero": True}, {}, {"set_advantage_to_zero": False}, {}],
    )
    # Before normalization the zero would have been a score of 0 and changed its siblings' baseline.
    assert sequence_advantages(group, estimator=bound(group_center)) == [0.0, 0.5, -0.5, -0.5]


@pytest.mark.parametrize("estimator", [*RELATIVE, raw])
def test_token_level_advantages_win_over_scores(estimator: Any) -> None:
    group = make_group(advantages=[[9.0, 9.0, 0.25, -2.0], [9.0, 1.0, 3.0]])
    assert rows_of(group, estimator) == [[0.0, 0.0, 0.25, -2.0], [0.0, 1.0, 3.0]]


def test_overrides_zero_token_level_advantages_too() -> None:
    group = make_group(
        advantages=[[9.0, 9.0, 0.25, -2.0], [9.0, 1.0, 3.0]], overrides=[{"set_advantage_to_zero": True}, {}]
    )
    assert rows_of(group, raw) == [[0.0] * 4, [0.0, 1.0, 3.0]]


def test_signal_is_asked_of_the_advantages_not_of_the_scores() -> None:
    equal = make_group(scores=[1.0, 1.0])
    assert not has_signal(token_advantages([equal], estimator=bound(group_norm)))
    assert has_signal(token_advantages([equal], estimator=bound(raw)))
    with_own = make_group(scores=[1.0, 1.0], advantages=[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    assert has_signal(token_advantages([with_own], estimator=bound(group_norm)))
