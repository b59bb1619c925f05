"""The learning rate is a function of the step alone."""

from __future__ import annotations

import pytest

from trainer.config import OptimizerSettings
from trainer.run.optimizer_step import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    optimizer = OptimizerSettings.model_validate({"learning_rate": 1.0} | settings)
    return [learning_rate(optimizer, step, total) for step in range(total)]


def test_warm_up_rises_from_its_first_fraction_to_the_full_rate() -> None:
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays() -> None:
    assert rates(3) == [1.0, 1.0, 1.0]


def test_cosine_falls_to_its_minimum() -> None:
    falling = rates(101, schedule="cosine", minimum_learning_rate_ratio=0.1, warmup_steps=1)
    assert falling[1] == pytest.approx(1.0)
    assert falling[51] == pytest.approx(0.55, abs=0.01)
    assert falling[100] == pytest.approx(0.1, abs=0.001)
    assert sorted(falling[1:], reverse=True) == falling[1:]
