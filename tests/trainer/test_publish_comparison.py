"""The verdict on a server's log-probs, case by case."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.publish.verification.compare_logprobs import Baseline, Scores, Verdict, compare

TOKENS = 200


def some_scores(seed: int = 0) -> Scores:
    generator = random.Random(seed)
    return [[-5.0 * generator.random() for _ in range(TOKENS // 4)] for _ in range(4)]


def shifted(scores: Scores, size: float, seed: int) -> Scores:
    """Scores with a normally distributed change of root mean square `size` at every token."""
    generator = random.Random(seed)
    return [[score + generator.gauss(0.0, size) for score in row] for row in scores]


def versions(step: float, noise: float) -> tuple[Scores, Scores, Baseline]:
    """What the trainer expects now, what a fresh server says, and a baseline `step` nats away."""
    old = some_scores()
    new = shifted(old, step, seed=1)
    baseline = Baseline(expected=old, served=shifted(old, noise, seed=2))
    return new, shifted(new, noise, seed=3), baseline


def test_numbers_within_the_tolerance_match() -> None:
    expected = some_scores()
    result = compare(shifted(expected, 1e-4, seed=1), expected, tolerance=1e-3)
    assert result.verdict is Verdict.MATCH
    assert result.matches
    assert result.tokens == TOKENS
    assert 0 < result.mean_difference < result.max_difference < 1e-3
    assert result.fraction is None
    assert not result.distinguishable


def test_numbers_over_the_tolerance_do_not() -> None:
    expected = some_scores()
    result = compare(shifted(expected, 1e-2, seed=1), expected, tolerance=1e-3)
    assert result.verdict is Verdict.OVER_TOLERANCE
    assert "over tolerance" in result.describe()


@pytest.mark.parametrize("step", [1e-4, 1e-3, 1e-1])
def test_old_weights_are_stale_however_small_the_step(step: float) -> None:
    new, fresh, baseline = versions(step, noise=1e-6)
    stale = shifted(baseline.expected, 1e-6, seed=4)
    assert compare(fresh, new, tolerance=1.0, baseline=baseline).verdict is Verdict.MATCH
    result = compare(stale, new, tolerance=1.0, baseline=baseline)
    assert result.verdict is Verdict.STALE
    assert result.fraction == pytest.approx(0.0, abs=0.1)
    # Also where the tolerance is exceeded.
    assert compare(stale, new, tolerance=step / 100, baseline=baseline).verdict is Verdict.STALE
    assert "0% of it arrived" in result.describe()


def test_less_than_half_an_update_is_stale() -> None:
    new, _, baseline = versions(1e-3, noise=1e-6)
    third = [
        [old + 0.3 * (now - old) for old, now in zip(*rows, strict=True)]
        for rows in zip(baseline.expected, new, strict=True)
    ]
    result = compare(third, new, tolerance=1.0, baseline=baseline)
    assert result.verdict is Verdict.STALE
    assert result.fraction == pytest.approx(0.3, abs=0.02)


def test_a_servers_constant_offset_does_not_hide_staleness() -> None:
    """A bfloat16 server differs by 0.05 nats always; the step moves the log-probs by a quarter of that."""
    old = some_scores()
    new = shifted(old, 0.3, seed=1)
    rounding = shifted([[0.0] * len(row) for row in old], 0.05, seed=2)

    def add(one: Scores, other: Scores) -> Scores:
        return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(one, other, strict=True)]

    baseline = Baseline(expected=old, served=add(old, rounding))
    fresh = compare(add(new, rounding), new, tolerance=1.0, baseline=baseline)
    assert fresh.verdict is Verdict.MATCH
    assert fresh.fraction == pytest.approx(1.0)
    stale = compare(shifted(baseline.served, 1e-9, seed=5), new, tolerance=1.0, baseline=baseline)
    assert stale.verdict is Verdict.STALE


def test_a_step_below_the_servers_precision_is_said_to_be_indistinguishable() -> None:
    new, fresh, baseline = versions(0.01, noise=0.05)
    result = compare(fresh, new, tolerance=0.25, baseline=baseline)
    assert result.verdict is Verdict.MATCH
    assert not result.distinguishable
    assert "too little to tell old from new" in result.describe()


def test_a_server_of_any_precision_that_did_not_move_by_a_bit_is_stale() -> None:
    new, _, baseline = versions(0.01, noise=0.05)
    assert compare(baseline.served, new, tolerance=0.25, baseline=baseline).verdict is Verdict.STALE


def test_unchanged_weights_pass_by_tolerance_alone_and_say_so() -> None:
    new, _, baseline = versions(0.0, noise=1e-6)
    result = compare(baseline.served, new, tolerance=1e-3, baseline=baseline)
    assert result.verdict is Verdict.MATCH
    assert result.expected_movement == 0.0
    assert not result.distinguishable


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, -1.7e308])
@pytest.mark.parametrize("whose", ["server", "trainer"])
def test_numbers_that_are_not_finite_never_match(broken: float, whose: str) -> None:
    good, bad = some_scores(), some_scores()
    bad[2][3] = broken
    served, expected = (bad, good) if whose == "server" else (good, bad)
    result = compare(served, expected, tolerance=1e9)
    assert result.verdict is Verdict.NOT_FINITE
    assert f"1 of {TOKENS} log-probs of the {whose}" in result.describe()


def test_a_wrong_number_of_log_probs_never_matches() -> None:
    expected = some_scores()
    for served in (expected[:-1], [*expected[:-1], expected[-1][:-1]], [], [[]]):
        assert compare(served, expected, tolerance=1e9).verdict is Verdict.WRONG_COUNT
    assert compare([], [], tolerance=1.0).verdict is Verdict.WRONG_COUNT


def test_a_baseline_of_other_probes_is_not_used() -> None:
    expected = some_scores()
    baseline = Baseline(expected=expected[:1], served=expected[:1])
    assert compare(expected, expected, tolerance=1.0, baseline=baseline).expected_movement is None


@given(
    step=st.floats(1e-5, 1.0),
    noise=st.floats(0.0, 0.2),
    seed=st.integers(0, 10_000),
)
def test_no_fresh_server_is_called_stale_and_no_judged_old_one_passes(
    step: float, noise: float, seed: int
) -> None:
    old = some_scores(seed)
    new = shifted(old, step, seed=seed + 1)
    baseline = Baseline(expected=old, served=shifted(old, noise, seed=seed + 2))
    fresh = compare(shifted(new, noise, seed=seed + 3), new, tolerance=9.0, baseline=baseline)
    stale = compare(shifted(old, noise, seed=seed + 4), new, tolerance=9.0, baseline=baseline)
    assert fresh.verdict is Verdict.MATCH
    assert stale.verdict is (Verdict.STALE if stale.distinguishable else Verdict.MATCH)
