"""Each advantage estimator against verl's numbers, plain references, and values worked out by hand."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows, run
from trainer.errors import ConfigurationError, DataError
from trainer.extensions import AdvantageEstimator, BoundEstimator, GroupScores, Options, advantage_estimator

VERL = json.loads((Path(__file__).parents[1] / "oracle/advantages.json").read_text())
AS_IN_VERL = {"group_norm": {"std": "n-1"}}
NAMES = list(VERL["batches"][0]["advantages"])
COUNTS = [30, 10, 20, 20]


def estimator(name: str, **options: Any) -> BoundEstimator:
    found: AdvantageEstimator[Any] = AdvantageEstimator.find(name)
    return found.bind(found.options(**options))


def group(scores: Sequence[float], trained_tokens: Sequence[int] | None = None) -> GroupScores:
    return GroupScores(scores=scores, trained_tokens=trained_tokens or [1] * len(scores))


def random_batch(seed: int) -> list[GroupScores]:
    generator = random.Random(seed)
    return [
        group(
            [generator.uniform(0.0, 3.0) for _ in range(size)],
            [generator.randint(1, 40) for _ in range(size)],
        )
        for size in (2, 7, 4, 16, 3)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_marked_so_equals_verl(name: str) -> None:
    estimate = estimator(name, **AS_IN_VERL.get(name, {}))
    for batch in VERL["batches"]:
        groups = [group(each["scores"], each["trained_tokens"]) for each in batch["groups"]]
        for ours, theirs in zip(estimate.of_batch(groups), batch["advantages"][name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_the_page_marks_what_is_compared_with_verl() -> None:
    page = (Path(__file__).parents[2] / "docs/advantages.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and "= verl's" in line]
    assert {row.split("`")[1] for row in rows} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "options", "scores", "trained_tokens", "expected"),
    [
        ("group_norm", {}, [1, 0, 0, 0], COUNTS, [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
        ("group_norm", {"std": "n-1"}, [1, 0, 0, 0], COUNTS, [1.5, -0.5, -0.5, -0.5]),
        ("opo", {}, [1, 0, 0, 0], COUNTS, [0.625, -0.375, -0.375, -0.375]),
        ("pass_at_k", {}, [1, 0, 0.5, 0], COUNTS, [0.5 / math.sqrt(0.6875 / 3), 0, 0, 0]),
        ("pass_at_k", {}, [1, 0, 1, 0], COUNTS, [0, 0, 0, 0]),
        ("maxrl", {}, [1, 0, 0, 0], COUNTS, [3, -1, -1, -1]),
        ("maxrl", {}, [0, 0, 0, 0], COUNTS, [0, 0, 0, 0]),
        # Mean 0.5, so the price of the longest is 0.05: x = 0.95, 1 - 0.05/3, -0.1/3, -0.1/3.
        (
            "length_shaping",
            {},
            [1, 1, 0, 0],
            COUNTS,
            [0.4833333333, 0.5166666667, -0.5, -0.5],
        ),
        ("length_shaping", {"weight": 0}, [1, 1, 0, 0], COUNTS, [0.5, 0.5, -0.5, -0.5]),
        ("length_shaping", {"weight": 1}, [-1, -1, 0, 0], COUNTS, [-0.5, -0.5, 0.5, 0.5]),
        # All right: only their length tells them apart. Prices 0.1, 0.1/3, 0.2/3, 0.2/3; their mean 0.2/3.
        ("length_shaping", {}, [1, 1, 1, 1], COUNTS, [-0.1 / 3, 0.1 / 3, 0, 0]),
        ("batch_std", {}, [1, 0, 0, 0], COUNTS, [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
        ("gpg", {}, [1, 0, 0, 0], COUNTS, [3, -1, -1, -1]),
        # Deviations .75 (30 tokens) and -.25 (50): mean .125, squares 30 * .625² + 50 * .375² = 18.75.
        (
            "reinforce_plus_plus_baseline",
            {},
            [1, 0, 0, 0],
            COUNTS,
            [0.625 / math.sqrt(18.75 / 79), *[-0.375 / math.sqrt(18.75 / 79)] * 3],
        ),
    ],
)
def test_values_worked_out_by_hand(
    name: str, options: dict[str, Any], scores: list[float], trained_tokens: list[int], expected: list[float]
) -> None:
    found = estimator(name, **options).of_batch([group(scores, trained_tokens)])
    np.testing.assert_allclose(found, [expected], rtol=3e-6, atol=1e-10)


def test_the_batch_counts_where_it_should() -> None:
    """Two groups by hand: scores 1, 0 of 10 and 30 tokens; scores 4, 0, 2 of 20 each."""
    groups = [group([1, 0], [10, 30]), group([4, 0, 2], [20, 20, 20])]
    np.testing.assert_allclose(
        np.concatenate(estimator("gpg").of_batch(groups)),
        np.array([0.5, -0.5, 2, -2, 0]) * 5 / 3,
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        np.concatenate(estimator("batch_std").of_batch(groups)),
        np.array([0.5, -0.5, 2, -2, 0]) / (np.std([1, 0, 4, 0, 2]) + 4e-6),
        rtol=1e-12,
    )
    tokens = np.repeat([0.5, -0.5, 2, -2, 0], [10, 30, 20, 20, 20])
    np.testing.assert_allclose(
        np.concatenate(estimator("reinforce_plus_plus_baseline").of_batch(groups)),
        (np.array([0.5, -0.5, 2, -2, 0]) - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8),
        rtol=1e-12,
    )


def reference(name: str, batch: list[GroupScores]) -> list[list[float]]:
    """The formulas of docs/advantages.md once more, in the plainest Python."""
    every_score = [score for each in batch for score in each.scores]
    nonzero = sum(score != 0 for score in every_score)
    deviations = [[score - statistics.fmean(each.scores) for score in each.scores] for each in batch]
    tokens = [
        value
        for each, of_group in zip(batch, deviations, strict=True)
        for value, count in zip(of_group, each.trained_tokens, strict=True)
        for _ in range(count)
    ]
    answers = []
    for each, of_group in zip(batch, deviations, strict=True):
        mean = statistics.fmean(each.scores)
        expanded = [s for s, n in zip(each.scores, each.trained_tokens, strict=True) for _ in range(n)]
        ranked = sorted(each.scores, reverse=True)
        longest = max(each.trained_tokens)
        shaped = [s - 0.1 * mean * n / longest for s, n in zip(each.scores, each.trained_tokens, strict=True)]
        lead = (ranked[0] - ranked[1]) / (statistics.stdev(each.scores) + 1e-6)
        answers.append(
            {
                "opo": [s - statistics.fmean(expanded) for s in each.scores],
                "pass_at_k": [lead if s == ranked[0] else 0.0 for s in each.scores],
                "maxrl": [value / mean for value in of_group],
                "length_shaping": [x - statistics.fmean(shaped) for x in shaped],
                "gpg": [value * len(every_score) / nonzero for value in of_group],
                "batch_std": [
                    value / (statistics.pstdev(every_score) + 1e-6 * max(every_score)) for value in of_group
                ],
                "reinforce_plus_plus_baseline": [
                    (value - statistics.fmean(tokens)) / math.sqrt(statistics.variance(tokens) + 1e-8)
                    for value in of_group
                ],
            }[name]
        )
    return answers


@pytest.mark.parametrize(
    "name",
    ["opo", "pass_at_k", "maxrl", "length_shaping", "gpg", "batch_std", "reinforce_plus_plus_baseline"],
)
@pytest.mark.parametrize("seed", range(5))
def test_each_is_its_formula_in_plain_python(name: str, seed: int) -> None:
    batch = random_batch(seed)
    for ours, plain in zip(estimator(name).of_batch(batch), reference(name, batch), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpg", "batch_std", "reinforce_plus_plus_baseline"])
def test_the_order_of_groups_does_not_matter_to_what_is_taken_over_the_batch(name: str) -> None:
    batch = random_batch(1)
    assert estimator(name).of_batch(batch[::-1])[::-1] == estimator(name).of_batch(batch)


@pytest.mark.parametrize("name", ["gpg", "batch_std", "reinforce_plus_plus_baseline", "opo"])
def test_batches_without_anything_to_divide_by_are_zeros(name: str) -> None:
    for batch in ([], [group([0.0, 0.0])], [group([3.0]), group([-1.0])], [group([0.0], [0])]):
        assert estimator(name).of_batch(batch) == [[0.0] * len(each.scores) for each in batch]
    assert estimator("opo").of_batch([group([1.0, 0.0], [0, 0])]) == [[0.0, 0.0]]


def test_whitened_tokens_have_mean_zero_and_variance_one() -> None:
    batch = random_batch(2)
    whitened = np.concatenate(estimator("reinforce_plus_plus_baseline").of_batch(batch))
    tokens = np.repeat(whitened, [count for each in batch for count in each.trained_tokens])
    assert tokens.mean() == pytest.approx(0.0, abs=1e-12)
    assert tokens.var(ddof=1) == pytest.approx(1.0, rel=1e-7)


def test_maxrl_refuses_scores_that_do_not_count_successes() -> None:
    with pytest.raises(DataError, match=r"mean of the group's scores is -0\.5, and maxrl divides by it"):
        estimator("maxrl")([-1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "ours"),
    [("grpo", "group_norm"), ("rloo", "leave_one_out"), ("reinforce++", "reinforce_plus_plus_baseline")],
)
def test_the_papers_names_lead_to_ours(name: str, ours: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"there is no advantage estimator .*did you mean {ours}\?"):
        AdvantageEstimator.find(name)


def test_a_second_half_that_returns_something_else_is_refused() -> None:
    def too_few(groups: Any, advantages: Any, options: Options) -> list[list[float]]:
        return [[0.0]]

    def not_finite(groups: Any, advantages: Any, options: Options) -> list[list[float]]:
        return [[math.nan] * len(of_group) for of_group in advantages]

    def broken(groups: Any, advantages: Any, options: Options) -> list[list[float]]:
        raise KeyError("k")

    for second_half, message in (
        (too_few, "advantages for 1 groups of a batch of 2"),
        (not_finite, "estimator centred made nan of a batch"),
        (broken, r"estimator centred raised KeyError: 'k' \(.*test_advantages_oracle\.py"),
    ):

        @advantage_estimator(over_batch=second_half)
        def centred(group: GroupScores, options: Options) -> list[float]:
            return [0.0] * len(group.scores)

        with pytest.raises(ConfigurationError, match=message):
            centred.bind(Options()).of_batch([group([1.0, 2.0]), group([1.0])])


@pytest.mark.parametrize("name", ["gpg", "batch_std", "reinforce_plus_plus_baseline"])
def test_a_step_is_the_same_however_it_is_cut_and_packed(
    name: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    ways = [("padded", "40"), ("plain", "64"), ("prefix_tree", "4096")]
    for packing, budget in ways:
        options = ("--data.packing", packing, "--data.tokens_per_micro_batch", budget)
        estimate = ("--data.advantage_estimator", name)
        run(tiny_model_directory, tmp_path / packing, make_bodies(1), *options, *estimate, steps=1)
    first, *others = [rows(tmp_path / packing)[0] for packing, _ in ways]
    assert first["micro_batches"] > others[-1]["micro_batches"]
    for other in others:
        for figure in ("loss", "grad_norm", "advantage_mean", "advantage_std"):
            assert other[figure] == pytest.approx(first[figure], rel=1e-4, abs=1e-7), figure
