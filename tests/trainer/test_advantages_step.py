"""Scaling the advantages of a step."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.samples.advantages import AdvantageNormalizer


def make_step(seed: int = 0, *, sequences: int = 6, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Advantages and masks of a step; masked positions hold a value that would be noticed."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(5 * sequences, generator=generator) < 0.7).float()
    mask[-1] = 1.0
    values = 3.0 * torch.randn(5 * sequences, generator=generator) + offset
    return torch.where(mask > 0, values, 1e6), mask


def trained_values(advantages: Tensor, mask: Tensor) -> Any:
    return advantages[mask > 0].double().numpy()


def test_batch_divides_by_the_standard_deviation_over_trained_tokens() -> None:
    advantages, mask = make_step(offset=2.0)
    scaled = AdvantageNormalizer("batch")(advantages, mask)
    np.testing.assert_allclose(scaled, advantages / np.std(trained_values(advantages, mask)), rtol=1e-6)
    assert scaled.dtype == torch.float32
    assert np.std(trained_values(scaled, mask)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("mode", ["none", "batch", "global"])
def test_a_zero_stays_zero_and_a_sign_stays_a_sign(mode: Any) -> None:
    advantages, mask = make_step(offset=5.0)
    advantages[2:5] = 0.0
    scaled = AdvantageNormalizer(mode)(advantages, mask)
    assert not scaled[2:5].any()
    assert torch.equal(advantages.sign(), scaled.sign())


def test_none_changes_nothing() -> None:
    advantages, mask = make_step()
    assert torch.equal(advantages, AdvantageNormalizer("none")(advantages, mask))


def test_global_divides_by_the_standard_deviation_of_every_step_so_far() -> None:
    normalizer = AdvantageNormalizer("global")
    seen: list[Any] = []
    for seed in range(5):
        advantages, mask = make_step(seed, sequences=2 + seed, offset=seed)
        seen.append(trained_values(advantages, mask))
        scaled = normalizer(advantages, mask)
        np.testing.assert_allclose(scaled, advantages / np.std(np.concatenate(seen)), rtol=1e-6)


def test_global_keeps_its_digits_under_a_large_offset_over_many_steps() -> None:
    normalizer = AdvantageNormalizer("global")
    values = torch.tensor([1e4 - 1.0, 1e4 + 1.0], dtype=torch.float64)
    for _ in range(2000):
        scaled = normalizer(values, torch.ones(2))
    torch.testing.assert_close(scaled, values, rtol=1e-6, atol=0)  # the deviation is 1


@pytest.mark.parametrize("mode", ["batch", "global"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e-9, 1e9])
def test_equal_advantages_stay_as_they_are(mode: Any, value: float) -> None:
    advantages = torch.full((7,), value)
    assert torch.equal(AdvantageNormalizer(mode)(advantages, torch.ones(7)), advantages)


@pytest.mark.parametrize("mode", ["batch", "global"])
def test_a_step_without_trained_tokens_is_left_alone_and_leaves_no_trace(mode: Any) -> None:
    normalizer = AdvantageNormalizer(mode)
    before = normalizer.state_dict()
    assert torch.equal(normalizer(torch.ones(3), torch.zeros(3)), torch.ones(3))
    assert normalizer(torch.ones(0), torch.ones(0)).numel() == 0
    assert normalizer.state_dict() == before


def test_state_survives_json_and_continues_bit_for_bit() -> None:
    uninterrupted = AdvantageNormalizer("global")
    for seed in range(3):
        uninterrupted(*make_step(seed))
    resumed = AdvantageNormalizer("global")
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert resumed.state_dict() == uninterrupted.state_dict()
    assert torch.equal(resumed(*make_step(9)), uninterrupted(*make_step(9)))


@pytest.mark.parametrize(
    "damage",
    [
        {"count": None},
        {"count": True},
        {"count": -1.0},
        {"mean": math.nan},
        {"mean": "0"},
        {"sum_of_squared_deviations": -1.0},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict[str, Any]) -> None:
    normalizer = AdvantageNormalizer("global")
    normalizer(*make_step())
    before = normalizer.state_dict()
    with pytest.raises(CheckpointError, match="advantage normalizer state has"):
        normalizer.load_state_dict(before | damage)
    with pytest.raises(CheckpointError, match="has count = None"):
        normalizer.load_state_dict({})
    assert normalizer.state_dict() == before
