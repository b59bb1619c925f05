"""What is valid on the wire and would be computed without an error, and wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from schemas import ScoredGroup
from trainer.extensions import Options
from trainer.samples.advantages import raw
from trainer.samples.validation import implausible_reason


def reason(*, uses_temperature: bool = True, limit: float | None = 1e6, **changes: Any) -> str | None:
    fields: dict[str, Any] = {
        "tokens": [[1, 2, 3], [1, 2, 5]],
        "masks": [[-100, -100, 3], [-100, -100, 5]],
        "scores": [1.0, 0.0],
    }
    return implausible_reason(
        ScoredGroup.model_validate(fields | changes),
        estimator=raw.bind(Options()),
        uses_temperature=uses_temperature,
        advantage_limit=limit,
    )


@pytest.mark.parametrize("value", [None, 0, 0.0, 0.01, 1, 100.0])
def test_temperatures_that_a_sampler_can_have_used_are_fine(value: object) -> None:
    assert reason(generation_params={"temperature": value}) is None


@pytest.mark.parametrize(
    "value", [-1, 1e-30, 0.009, 101, float("nan"), float("inf"), "0.7", True, [], 10**400]
)
def test_other_temperatures_are_named_with_their_place(value: object) -> None:
    found = reason(overrides=[{}, {"temperature": value}])
    assert found is not None
    assert found.startswith("overrides[1] has temperature ")
    assert len(found) < 200


def test_only_the_nearest_word_on_temperature_is_judged_and_only_where_the_loss_uses_it() -> None:
    near = {"overrides": [{"temperature": 1}] * 2, "generation_params": {"temperature": "hot"}}
    assert reason(**near) is None
    assert reason(generation_params={"temperature": "hot"}, uses_temperature=False) is None


@pytest.mark.parametrize("value", [True, False, None, 0, 1])
def test_an_advantage_may_be_set_to_zero_by_a_boolean(value: object) -> None:
    assert reason(overrides=[{"set_advantage_to_zero": value}, {}]) is None


@pytest.mark.parametrize("value", ["false", "", 2, [], {}])
def test_what_is_no_boolean_does_not_set_an_advantage_to_zero(value: object) -> None:
    found = reason(overrides=[{"set_advantage_to_zero": value}, {}])
    assert found is not None
    assert "overrides[0] has set_advantage_to_zero" in found


def test_advantages_are_bounded_at_trained_tokens_only() -> None:
    assert reason(advantages=[[1e38, 1e38, 1.0], [0.0, 0.0, 1e6]]) is None
    found = reason(advantages=[[0.0, 0.0, 1.0], [0.0, 0.0, -1e38]])
    assert found is not None
    assert found.startswith("advantages[1][2] is -1e+38, beyond 1e+06 (data.advantage_limit)")
    assert reason(advantages=[[0.0, 0.0, 1.0], [0.0, 0.0, -1e38]], limit=None) is None


def test_advantages_from_scores_are_bounded_too() -> None:
    found = reason(scores=[0.0, 2e6])
    assert found is not None
    assert found.startswith("the advantage of sequence 1 is 2e+06")
