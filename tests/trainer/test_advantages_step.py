"""Scaling and clipping the advantages of a step."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.advantages import (
    AdvantageMoments,
    AdvantageNormalizer,
    clip_advantages,
    measure_advantages,
)
from trainer.errors import CheckpointError, ConfigurationError, ShapeMismatchError


def make_step(seed: int = 0, *, sequences: int = 6, offset: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Ragged advantages and masks; masked positions hold a value that would be noticed."""
    generator = torch.Generator().manual_seed(seed)
    advantages, masks = [], []
    for index in range(sequences):
        mask = (torch.rand(3 + index, generator=generator) < 0.7).float()
        mask[-1] = 1.0
        values = 3.0 * torch.randn(3 + index, generator=generator) + offset
        advantages.append(torch.where(mask > 0, values, 1e6))
        masks.append(mask)
    return advantages, masks


def trained_values(advantages: list[Tensor], masks: list[Tensor]) -> Any:
    return torch.cat([row[mask > 0] for row, mask in zip(advantages, masks, strict=True)]).double().numpy()


def test_batch_divides_by_the_standard_deviation_over_trained_tokens() -> None:
    advantages, masks = make_step(offset=2.0)
    scaled = AdvantageNormalizer("batch")(advantages, masks)
    deviation = np.std(trained_values(advantages, masks))
    for before, after in zip(advantages, scaled, strict=True):
        np.testing.assert_allclose(after, before / deviation, rtol=1e-6)
        assert after.dtype == torch.float32
    assert np.std(trained_values(scaled, masks)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("mode", ["none", "batch", "global"])
def test_a_zero_stays_zero_and_a_sign_stays_a_sign(mode: Any) -> None:
    advantages, masks = make_step(offset=5.0)
    advantages[2][:] = 0.0
    scaled = AdvantageNormalizer(mode)(advantages, masks)
    assert not scaled[2].any()
    for before, after in zip(advantages, scaled, strict=True):
        assert torch.equal(before.sign(), after.sign())


def test_none_changes_nothing() -> None:
    advantages, masks = make_step()
    for before, after in zip(advantages, AdvantageNormalizer("none")(advantages, masks), strict=True):
        assert torch.equal(before, after)


def test_global_divides_by_the_standard_deviation_of_every_step_so_far() -> None:
    normalizer = AdvantageNormalizer("global")
    seen: list[Any] = []
    for seed in range(5):
        advantages, masks = make_step(seed, offset=seed)
        seen.append(trained_values(advantages, masks))
        scaled = normalizer(advantages, masks)
        np.testing.assert_allclose(scaled[0], advantages[0] / np.std(np.concatenate(seen)), rtol=1e-6)


def test_global_keeps_its_digits_under_a_large_offset_over_many_steps() -> None:
    normalizer = AdvantageNormalizer("global")
    divisor = 0.0
    for _ in range(2000):
        values = torch.tensor([1e4 - 1.0, 1e4 + 1.0], dtype=torch.float64)
        divisor = normalizer.divisor(measure_advantages([values], [torch.ones(2)]))
    assert divisor == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("mode", ["batch", "global"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e-9, 1e9])
def test_equal_advantages_stay_as_they_are(mode: Any, value: float) -> None:
    advantages = [torch.full((4,), value), torch.full((3,), value)]
    scaled = AdvantageNormalizer(mode)(advantages, [torch.ones(4), torch.ones(3)])
    assert torch.equal(torch.cat(scaled), torch.cat(advantages))


@pytest.mark.parametrize("mode", ["batch", "global"])
def test_a_step_without_trained_tokens_is_left_alone_and_leaves_no_trace(mode: Any) -> None:
    normalizer = AdvantageNormalizer(mode)
    before = normalizer.state_dict()
    assert torch.equal(normalizer([torch.ones(3)], [torch.zeros(3)])[0], torch.ones(3))
    assert normalizer([], []) == []
    assert normalizer.state_dict() == before


@pytest.mark.parametrize("mode", ["batch", "global"])
@pytest.mark.parametrize(
    "shares", [((0, 1, 2), (3, 4, 5)), ((0, 1, 2, 3, 4, 5), ()), ((5,), (0, 2, 4), (1, 3))]
)
def test_processes_with_a_share_each_divide_as_one_process_with_all(
    mode: Any, shares: tuple[tuple[int, ...], ...]
) -> None:
    whole = AdvantageNormalizer(mode)
    totals: list[AdvantageMoments] = []
    processes = [AdvantageNormalizer(mode, reduce=lambda _own: totals[-1]) for _ in shares]
    for seed in range(3):
        advantages, masks = make_step(seed, offset=1.0)
        expected = whole(advantages, masks)
        parts = [([advantages[i] for i in share], [masks[i] for i in share]) for share in shares]
        # What an all-reduce does: every process gives its sums, every process gets their total.
        totals.append(sum((measure_advantages(*part) for part in parts), AdvantageMoments()))
        for process, share, part in zip(processes, shares, parts, strict=True):
            for index, scaled in zip(share, process(*part), strict=True):
                torch.testing.assert_close(scaled, expected[index], rtol=1e-6, atol=0)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=8), min_size=1, max_size=6))
def test_moments_add_up_over_any_split(rows: list[list[float]]) -> None:
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    masks = [torch.ones(len(row)) for row in rows]
    whole = measure_advantages(tensors, masks)
    summed = sum(
        (measure_advantages([row], [mask]) for row, mask in zip(tensors, masks, strict=True)),
        AdvantageMoments(),
    )
    values = np.concatenate([np.array(row) for row in rows])
    assert whole.count == summed.count == len(values)
    assert summed.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-9)
    assert summed.sum_of_squared_deviations == pytest.approx(
        whole.sum_of_squared_deviations, rel=1e-6, abs=1e-6
    )
    assert whole.sum_of_squared_deviations == pytest.approx(
        ((values - values.mean()) ** 2).sum(), rel=1e-6, abs=1e-6
    )


def test_state_survives_json_and_continues_bit_for_bit() -> None:
    uninterrupted = AdvantageNormalizer("global")
    for seed in range(3):
        uninterrupted(*make_step(seed))
    resumed = AdvantageNormalizer("global")
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert resumed.state_dict() == uninterrupted.state_dict()
    for ours, theirs in zip(resumed(*make_step(9)), uninterrupted(*make_step(9)), strict=True):
        assert torch.equal(ours, theirs)


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


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="allowed are none, batch, global"):
        AdvantageNormalizer("running")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "batch", "global"])
def test_masks_of_another_shape_are_refused(mode: Any) -> None:
    with pytest.raises(ShapeMismatchError, match=r"\[\[3\]\], loss masks \[\[4\]\]"):
        AdvantageNormalizer(mode)([torch.ones(3)], [torch.ones(4)])


def test_clipping_holds_advantages_between_its_bounds() -> None:
    (clipped,) = clip_advantages([torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])], -2.0, 5.0)
    assert clipped.tolist() == [-2.0, -1.0, 0.0, 1.0, 5.0]


@pytest.mark.parametrize("bounds", [(1.0, 5.0), (-5.0, -1.0), (5.0, -5.0), (0.0, 0.0), (math.nan, 1.0)])
def test_clipping_refuses_bounds_that_would_move_a_zero(bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match="must enclose 0"):
        clip_advantages([torch.zeros(2)], *bounds)
