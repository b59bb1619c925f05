"""What holds for every loss, the textbook signs of the oldest three, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.config import LossSettings
from trainer.errors import ConfigurationError, DataError, MissingLogProbsError, ShapeMismatchError
from trainer.extensions import BUILT_IN_LOSSES, Loss
from trainer.losses import (
    LossInputs,
    clip_cov,
    decoupled_ppo,
    kl_cov,
    luspo,
    policy_gradient,
    ppo_clip,
    prime,
    weighted_sft,
)

ALL_LOSSES: tuple[Loss[Any], ...] = tuple(Loss.find(name) for name in BUILT_IN_LOSSES)
OLDEST: tuple[Loss[Any], ...] = (weighted_sft, policy_gradient, ppo_clip)
RATIO_LOSSES = tuple(loss for loss in ALL_LOSSES if loss is not weighted_sft)
EVERY_LOSS = pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: loss.__name__)


def make_inputs(
    *, seed: int = 0, shape: tuple[int, ...] = (3, 7), spread: float = 0.5, **changes: Any
) -> LossInputs:
    """Float64 inputs with log-probs near each other, a ragged float mask, and filler of 1.0 where masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = -normal().abs()
    loss_mask = torch.rand(shape, generator=generator).double() * (
        torch.rand(shape, generator=generator) < 0.6
    )
    fields: dict[str, Any] = {
        "logprobs": logprobs.requires_grad_(),
        "advantages": normal(),
        "loss_mask": loss_mask,
        "inference_logprobs": torch.where(loss_mask > 0, logprobs.detach() + spread * normal(), 1.0),
        "ref_logprobs": torch.where(loss_mask > 0, logprobs.detach() + spread * normal(), 1.0),
    }
    return LossInputs(**(fields | changes))


def one_token(advantage: float, ratio: float, **changes: Any) -> LossInputs:
    """A single token of which the trainer's probability is `ratio` times the sampler's."""
    sampler = math.log(0.1)
    fields: dict[str, Any] = {
        "logprobs": torch.tensor([sampler + math.log(ratio)], dtype=torch.float64, requires_grad=True),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "loss_mask": torch.ones(1, dtype=torch.float64),
        "inference_logprobs": torch.tensor([sampler], dtype=torch.float64),
        "denominator": 1.0,
    }
    return LossInputs(**(fields | changes))


def value_and_gradient(loss: Loss[Any], inputs: LossInputs, **options: Any) -> tuple[float, Tensor]:
    value, _ = loss(inputs, **options)
    (gradient,) = torch.autograd.grad(value, inputs.logprobs)
    return value.item(), gradient


def by_hand(loss: Loss[Any], inputs: LossInputs, kl_coefficient: float) -> float:
    """The definitions, token by token, in Python floats; default options."""
    assert inputs.inference_logprobs is not None
    assert inputs.ref_logprobs is not None
    numerator = denominator = 0.0
    for logprob, advantage, weight, sampler, reference in zip(
        inputs.logprobs.flatten().tolist(),
        inputs.advantages.flatten().tolist(),
        inputs.loss_mask.flatten().tolist(),
        inputs.inference_logprobs.flatten().tolist(),
        inputs.ref_logprobs.flatten().tolist(),
        strict=True,
    ):
        if weight == 0:
            continue
        ratio = math.exp(logprob - sampler)
        if loss is weighted_sft:
            term = -logprob * advantage
        elif loss is policy_gradient:
            term = -min(ratio, 2.0) * advantage * logprob
        else:
            term = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        kl = math.exp(reference - logprob) - 1 - (reference - logprob)
        numerator += weight * (term + kl_coefficient * kl)
        denominator += weight
    return numerator / (denominator + 1e-8)


@pytest.mark.parametrize("loss", OLDEST, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_equals_its_definition(loss: Loss[Any], kl_coefficient: float, seed: int) -> None:
    inputs = make_inputs(seed=seed)
    value, _ = loss(inputs, kl_coefficient=kl_coefficient)
    assert value.item() == pytest.approx(by_hand(loss, inputs, kl_coefficient), rel=1e-12)


# policy_gradient is left out: its weight is held constant, so its gradient is not its value's derivative.
@pytest.mark.parametrize("loss", [weighted_sft, ppo_clip], ids=lambda loss: loss.__name__)
def test_gradient_is_that_of_finite_differences(loss: Loss[Any]) -> None:
    base = make_inputs(seed=4)

    def run(logprobs: Tensor) -> Tensor:
        return loss(LossInputs(**(vars_of(base) | {"logprobs": logprobs})), kl_coefficient=0.2)[0]

    assert torch.autograd.gradcheck(run, (base.logprobs,))


def vars_of(inputs: LossInputs) -> dict[str, Any]:
    names = (
        "logprobs",
        "advantages",
        "loss_mask",
        "inference_logprobs",
        "ref_logprobs",
        "denominator",
        "sequence_ids",
    )
    return {name: getattr(inputs, name) for name in names}


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected_loss", "expected_gradient"),
    [
        # inside the bounds: the plain surrogate, gradient -r A
        (+1.0, 1.0, -1.0, -1.0),
        (-1.0, 1.0, +1.0, +1.0),
        # the four regions outside
        (+1.0, 2.0, -1.2, 0.0),  # already likelier than allowed: stop
        (+1.0, 0.5, -0.5, -0.5),  # praised but rarer: keep pushing up
        (-1.0, 2.0, +2.0, +2.0),  # blamed but likelier: keep pushing down (not 1.2 without gradient)
        (-1.0, 0.5, +0.8, 0.0),  # already rarer than allowed: stop
    ],
)
def test_ppo_has_the_textbook_sign_in_every_region(
    advantage: float, ratio: float, expected_loss: float, expected_gradient: float
) -> None:
    value, gradient = value_and_gradient(ppo_clip, one_token(advantage, ratio))
    assert value == pytest.approx(expected_loss)
    assert gradient.item() == pytest.approx(expected_gradient)


def test_ppo_bounds_are_separate_and_count_what_they_clip() -> None:
    inputs = LossInputs(
        logprobs=torch.log(torch.tensor([1.25, 1.35, 0.85, 0.75, 1.35, 0.75])).requires_grad_(),
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0]),
        loss_mask=torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 1.0]),
        inference_logprobs=torch.zeros(6),
    )
    _, metrics = ppo_clip(inputs, epsilon_low=0.2, epsilon_high=0.3)
    assert metrics["clipped_high"].item() == 1.0  # only the second
    assert metrics["clipped_low"].item() == 0.5  # only the fourth, by its weight
    assert metrics["clipped"].item() == 1.5


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.9, 1.9), (2.1, 2.0), (50.0, 2.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_policy_gradient_weighs_by_the_truncated_ratio_held_constant(
    ratio: float, weight: float, advantage: float
) -> None:
    inputs = one_token(advantage, ratio)
    value, gradient = value_and_gradient(policy_gradient, inputs)
    assert gradient.item() == pytest.approx(-weight * advantage)
    assert value == pytest.approx(-weight * advantage * inputs.logprobs.item())
    assert policy_gradient(inputs)[1]["capped"].item() == (1.0 if ratio > 2 else 0.0)


def test_on_policy_all_three_losses_have_one_gradient() -> None:
    inputs = make_inputs(spread=0.0)
    gradients = [value_and_gradient(loss, inputs)[1] for loss in OLDEST]
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@EVERY_LOSS
def test_on_policy_a_sequence_of_one_advantage_has_one_gradient_under_every_loss(loss: Loss[Any]) -> None:
    """Summed over its tokens, it is minus the advantage times the tokens; luspo weighs a long one more."""
    advantages = torch.tensor([[1.5], [-0.5], [0.0]], dtype=torch.float64).expand(3, 7)
    mask = (make_inputs().loss_mask > 0).double()
    inputs = make_inputs(advantages=advantages, loss_mask=mask, spread=0.0, denominator=1.0)
    nothing_is_held_back = {"covariance_low": 1e8, "covariance_high": 1e9}
    _, gradient = value_and_gradient(loss, inputs, **nothing_is_held_back if loss is clip_cov else {})
    lengths = mask.sum(1)
    expected = -advantages[:, 0] * lengths * (lengths if loss is luspo else 1)
    assert gradient.sum(1).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("loss", [ppo_clip, decoupled_ppo, prime, kl_cov], ids=lambda loss: loss.__name__)
def test_beyond_a_log_ratio_of_twenty_a_token_has_no_gradient_through_it(loss: Loss[Any]) -> None:
    near, far = (one_token(-1.0, math.exp(log_ratio)) for log_ratio in (19.0, 21.0))
    options = {"proximal": "interpolated"} if loss is decoupled_ppo else {}
    assert value_and_gradient(loss, near, **options)[1].item() > 1e8
    assert value_and_gradient(loss, far, **options)[1].item() == 0.0


@pytest.mark.parametrize("difference", [-21.0, 21.0])
def test_beyond_a_log_ratio_of_twenty_the_reference_has_no_gradient(difference: float) -> None:
    inputs = one_token(0.0, 1.0)
    far = LossInputs(**(vars_of(inputs) | {"ref_logprobs": inputs.logprobs.detach() + difference}))
    assert value_and_gradient(weighted_sft, far, kl_coefficient=1.0)[1].item() == 0.0


@pytest.mark.parametrize(
    ("options", "user"),
    [
        ({}, None),
        ({"kl_coefficient": 0.1}, None),
        ({"correction": {"weight": "token_tis"}}, "loss.correction"),
        ({"correction": {"reject": "token"}}, "loss.correction"),
        ({"kl_coefficient": 0.1, "kl_estimator": "k3_unbiased"}, "loss.kl_estimator k3_unbiased"),
        ({"name": "ppo_clip"}, "loss.name ppo_clip"),
    ],
)
def test_what_uses_the_samplers_logprobs_is_named(options: dict[str, Any], user: str | None) -> None:
    settings = LossSettings(**options)
    assert settings.user_of_inference_logprobs == user
    assert settings.bound.needs_inference_logprobs == (user is not None)


def test_kl_is_zero_with_zero_gradient_between_equal_policies() -> None:
    inputs = make_inputs(advantages=torch.zeros(3, 7), spread=0.0)
    value, gradient = value_and_gradient(weighted_sft, inputs, kl_coefficient=1.0)
    assert value == 0.0
    assert not gradient.any()
    metrics = policy_gradient(inputs)[1]
    assert metrics["kl_ref"].item() == metrics["mismatch_kl"].item() == 0.0
    assert metrics["ratio"].item() == pytest.approx(inputs.loss_mask.sum().item())


@pytest.mark.parametrize("difference", [-3.0, -1e-4, 1e-4, 3.0])
def test_kl_is_positive_elsewhere_and_pulls_towards_the_reference(difference: float) -> None:
    inputs = one_token(0.0, 1.0)
    inputs = LossInputs(**(vars_of(inputs) | {"ref_logprobs": inputs.logprobs.detach() + difference}))
    value, gradient = value_and_gradient(weighted_sft, inputs, kl_coefficient=0.5)
    assert value == pytest.approx(0.5 * (math.expm1(difference) - difference), rel=1e-6)
    assert value > 0
    assert math.copysign(1, -gradient.item()) == math.copysign(1, difference)


def test_small_kl_keeps_its_digits_in_float32() -> None:
    logprobs = torch.full((4,), -0.5, requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        advantages=torch.zeros(4),
        loss_mask=torch.ones(4),
        ref_logprobs=torch.full((4,), -0.5 + 2**-10),
    )
    # exp(x) - 1 - x in float32 would be 30% off here.
    assert weighted_sft(inputs)[1]["kl_ref"].item() == pytest.approx(4 * (2**-10) ** 2 / 2, rel=2e-3)


@EVERY_LOSS
@pytest.mark.parametrize("poison", [1.0, 1e30, math.inf, -math.inf, math.nan])
def test_nothing_at_a_masked_position_matters(loss: Loss[Any], poison: float) -> None:
    clean = make_inputs()
    masked = clean.loss_mask == 0
    poisoned = {
        name: value.detach().masked_fill(masked, poison)
        for name, value in vars_of(clean).items()
        if isinstance(value, Tensor) and name != "loss_mask"
    }
    poisoned["logprobs"].requires_grad_()
    inputs = LossInputs(loss_mask=clean.loss_mask, **poisoned)
    value, gradient = value_and_gradient(loss, inputs, kl_coefficient=0.1)
    expected_value, expected_gradient = value_and_gradient(loss, clean, kl_coefficient=0.1)
    assert value == expected_value
    assert torch.equal(gradient, expected_gradient)
    assert not gradient[masked].any()
    metrics, expected_metrics = loss(inputs)[1], loss(clean)[1]
    assert {name: sum_.item() for name, sum_ in metrics.items()} == {
        name: sum_.item() for name, sum_ in expected_metrics.items()
    }


@EVERY_LOSS
@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_wildly_different_policies_stay_finite_in_float32(loss: Loss[Any], difference: float) -> None:
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        advantages=torch.tensor([1.0, -1.0, 0.0]),
        loss_mask=torch.ones(3),
        inference_logprobs=torch.full((3,), -1.0 + difference),
        ref_logprobs=torch.full((3,), -1.0 + difference),
        sequence_ids=torch.tensor([0, 0, 1]),
    )
    value, metrics = loss(inputs, kl_coefficient=0.1)
    value.backward()
    assert value.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert all(total.isfinite() for total in metrics.values())


@EVERY_LOSS
def test_an_all_zero_mask_gives_zero_with_zero_gradients(loss: Loss[Any]) -> None:
    for denominator in (None, 12.0, torch.zeros(3, 1)):
        inputs = make_inputs(loss_mask=torch.zeros(3, 7), denominator=denominator)
        value, gradient = value_and_gradient(loss, inputs, kl_coefficient=0.1)
        assert value == 0.0
        assert torch.equal(gradient, torch.zeros(3, 7, dtype=torch.float64))
        assert all(total.item() == 0.0 for total in loss(inputs)[1].values())


@EVERY_LOSS
@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 4), (5, 1), (3, 3)])
def test_micro_batches_add_up_under_a_common_denominator(loss: Loss[Any], sizes: tuple[int, ...]) -> None:
    whole = make_inputs(shape=(6, 9))
    bound = loss.bind(loss.options())
    if bound.step_statistics is not None:  # what a run takes once, of the whole step
        before = LossInputs(**(vars_of(whole) | {"logprobs": whole.inference_logprobs}))
        statistics = bound.step_statistics(before, bound.options)
        whole = LossInputs(**vars_of(whole), statistics=statistics)
    count = whole.loss_mask.sum().item()
    expected_value, expected_gradient = value_and_gradient(
        loss, replace(whole, denominator=count), kl_coefficient=0.1
    )
    expected_metrics = loss(whole)[1]
    values, gradients, metrics = [], [], []
    for rows in torch.arange(6).split(list(sizes)):
        part = {name: value[rows] for name, value in vars_of(whole).items() if isinstance(value, Tensor)}
        part["logprobs"] = part["logprobs"].detach().requires_grad_()
        inputs = LossInputs(**part, denominator=count, statistics=whole.statistics)
        value, gradient = value_and_gradient(loss, inputs, kl_coefficient=0.1)
        values.append(value)
        gradients.append(gradient)
        metrics.append(loss(inputs)[1])
    assert sum(values) == pytest.approx(expected_value, rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients), expected_gradient, rtol=1e-12, atol=0)
    for name, expected in expected_metrics.items():
        assert sum(part[name].item() for part in metrics) == pytest.approx(expected.item(), rel=1e-12)


def test_a_denominator_per_token_or_per_sequence_reduces_by_sequence() -> None:
    inputs = make_inputs()
    per_sequence = inputs.loss_mask.sum(1, keepdim=True) * 3
    expected = sum(
        weighted_sft(
            LossInputs(
                logprobs=inputs.logprobs[row],
                advantages=inputs.advantages[row],
                loss_mask=inputs.loss_mask[row],
                denominator=per_sequence[row, 0],
            )
        )[0].item()
        for row in range(3)
    )
    for denominator in (per_sequence, per_sequence.expand(3, 7)):
        value, _ = weighted_sft(LossInputs(**(vars_of(inputs) | {"denominator": denominator})))
        assert value.item() == pytest.approx(expected, rel=1e-12)


@EVERY_LOSS
def test_metrics_are_detached_sums(loss: Loss[Any]) -> None:
    inputs = make_inputs()
    metrics = loss(inputs)[1]
    assert {"negative_logprob", "ratio", "mismatch_kl", "kl_ref"} <= set(metrics)
    assert all(total.ndim == 0 and not total.requires_grad for total in metrics.values())
    assert metrics["negative_logprob"].item() == pytest.approx(
        -(inputs.logprobs * inputs.loss_mask).sum().item()
    )


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=lambda loss: loss.__name__)
def test_losses_with_a_ratio_refuse_to_run_without_the_samplers_logprobs(loss: Loss[Any]) -> None:
    with pytest.raises(MissingLogProbsError, match=f"{loss.__name__} needs inference_logprobs"):
        loss(make_inputs(inference_logprobs=None))


@EVERY_LOSS
def test_a_kl_penalty_refuses_to_run_without_reference_logprobs(loss: Loss[Any]) -> None:
    with pytest.raises(MissingLogProbsError, match="needs ref_logprobs"):
        loss(make_inputs(ref_logprobs=None), kl_coefficient=0.1)
    assert "kl_ref" not in loss(make_inputs(ref_logprobs=None))[1]


def test_unequal_shapes_are_refused_and_all_are_listed() -> None:
    with pytest.raises(
        ShapeMismatchError, match=r"logprobs \[3, 7\].*advantages \[3, 1\].*ref_logprobs \[3, 7\]"
    ):
        make_inputs(advantages=torch.zeros(3, 1))


def test_half_precision_logprobs_are_refused() -> None:
    with pytest.raises(DataError, match="bfloat16"):
        make_inputs(logprobs=torch.zeros(3, 7, dtype=torch.bfloat16))


def test_a_denominator_that_is_not_positive_or_of_a_foreign_shape_is_refused() -> None:
    for denominator in (0.0, -1.0, math.nan):
        with pytest.raises(DataError, match="denominator"):
            make_inputs(denominator=denominator)
    for shape in ((7, 3), (4,), (2, 3, 7)):
        with pytest.raises(ShapeMismatchError, match="does not broadcast"):
            make_inputs(denominator=torch.ones(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_mask": torch.tensor([1.0, -0.5])}, r"loss_mask has -0\.5 at \[1\]"),
        ({"loss_mask": torch.tensor([math.nan, 1.0])}, r"loss_mask has nan at \[0\]"),
        ({"loss_mask": torch.tensor([1, -1])}, r"loss_mask has -1 at \[1\]"),
        ({"sequence_ids": torch.tensor([0, -1])}, "sequence_ids has -1; number the sequences from 0"),
        ({"sequence_ids": torch.tensor([0.0, 1.0])}, r"sequence_ids are torch\.float32; .*int64"),
        (
            {"sequence_ids": torch.tensor([0, 2]), "sequence_count": 2},
            "sequence_ids has 2, but sequence_count is 2; pass at least 3",
        ),
    ],
)
def test_a_mask_or_sequence_ids_that_would_mislead_are_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "logprobs": torch.tensor([-1.0, -2.0]),
        "advantages": torch.ones(2),
        "loss_mask": torch.ones(2),
    }
    with pytest.raises(DataError, match=message):
        LossInputs(**(fields | changes))
    boolean = LossInputs(**(fields | {"loss_mask": torch.tensor([True, False])}))
    assert weighted_sft(boolean)[0].item() == pytest.approx(1.0)
    empty = {name: value[:0] for name, value in fields.items()}
    ids = torch.zeros(0, dtype=torch.int64)
    assert weighted_sft(LossInputs(**empty, sequence_ids=ids, sequence_count=0))[0].item() == 0.0


@pytest.mark.parametrize("name", BUILT_IN_LOSSES)
def test_a_bound_loss_is_the_function_with_its_options(name: str) -> None:
    loss: Loss[Any] = Loss.find(name)
    bound = loss.bind(loss.options(kl_coefficient=0.25))
    inputs = make_inputs()
    assert bound(inputs)[0].item() == loss(inputs, kl_coefficient=0.25)[0].item()
    assert bound.needs_ref_logprobs
    assert bound.trains_without_advantage
    without = loss.bind(loss.options())
    assert not without.needs_ref_logprobs
    assert without.trains_without_advantage == (name in ("prime", "ipo", "kl_cov"))
    assert bound.needs_inference_logprobs == (name != "weighted_sft")


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (weighted_sft, {"ratio_cap": 2.0}, "weighted_sft has no option ratio_cap: its options are kl_coeff"),
        (ppo_clip, {"epsilon_lo": 2.0}, r"no option epsilon_lo \(did you mean epsilon_low\?\)"),
        (ppo_clip, {"reduction": "sequence"}, r"has no option reduction: pass .* LossInputs\.denominator"),
        (ppo_clip, {"two_sided": 1.1}, r"two_sided 1\.1 is not above 1\.2, which is 1 \+ epsilon_high"),
        (ppo_clip, {"two_sided": 4.0, "epsilon_high": 3.0}, "two_sided 4 is not above 4.* epsilon_high 3"),
        (policy_gradient, {"ratio_cap": 0.0}, "policy_gradient: ratio_cap is 0.0: .*greater than 0"),
        (ppo_clip, {"epsilon_low": 1.5}, "epsilon_low is 1.5: .*less than 1"),
        (ppo_clip, {"epsilon_high": math.nan}, "epsilon_high is nan"),
        (weighted_sft, {"kl_coefficient": -0.1}, "kl_coefficient is -0.1"),
        (weighted_sft, {"kl_coefficient": math.inf}, "kl_coefficient is inf"),
    ],
)
def test_options_are_checked_on_a_direct_call_too(
    loss: Loss[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        loss(make_inputs(), **options)


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=lambda loss: loss.__name__)
def test_a_corrections_weight_counts_once_beside_a_ratio_of_the_loss(loss: Loss[Any]) -> None:
    """The gradient is the one on policy, times the weight: bounds of the ratio stop nothing."""
    spread = 0.5 if loss in (ppo_clip, policy_gradient) else 0.05  # trust regions still measure the sampler
    penalties = {"mismatch_penalty": 0.0, "covariance_penalty": 1e-20}
    options = {name: value for name, value in penalties.items() if name in loss.options.model_fields}
    inputs = make_inputs(spread=spread)
    weighted, _ = loss(inputs, correction={"weight": "sequence_tis", "ratio_cap": 1.05}, **options)
    (gradient,) = torch.autograd.grad(weighted, inputs.logprobs)

    on_policy, _ = loss(replace(inputs, inference_logprobs=inputs.logprobs.detach()), **options)
    (expected,) = torch.autograd.grad(on_policy, inputs.logprobs)
    difference = torch.where(inputs.loss_mask > 0, inputs.logprobs - inputs.inference_logprobs, 0.0)
    weights = torch.exp(difference.sum(dim=-1, keepdim=True)).clamp(max=1.05).detach()
    assert weights.unique().numel() > 1
    torch.testing.assert_close(gradient, expected * weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", RATIO_LOSSES, ids=lambda loss: loss.__name__)
def test_a_loss_with_a_ratio_takes_the_masks_of_a_correction(loss: Loss[Any]) -> None:
    inputs = make_inputs(advantages=-torch.ones(3, 7, dtype=torch.float64))
    masks = ({"reject": "token", "reject_above": 1e-6}, {"off_policy_limit": 1e-6})
    assert any(loss(inputs, correction=mask)[0] != loss(inputs)[0] for mask in masks)


def test_what_belongs_to_a_sequence_is_summed_and_averaged_over_its_trained_tokens_only() -> None:
    inputs = make_inputs(shape=(3, 4), loss_mask=torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]))
    values = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).masked_fill(~inputs.trained, math.nan)
    sums = torch.tensor([[6.0] * 4, [7.0] * 4, [0.0] * 4], dtype=torch.float64)
    means = torch.tensor([[2.0] * 4, [7.0] * 4, [0.0] * 4], dtype=torch.float64)
    assert torch.equal(inputs.sequence_sum(values), sums)
    assert torch.equal(inputs.sequence_mean(values), means)
    kept = inputs.trained
    packed = {name: value[kept] for name, value in vars_of(inputs).items() if isinstance(value, Tensor)}
    flat = LossInputs(**packed, sequence_ids=torch.tensor([0, 0, 0, 1]), sequence_count=3)
    assert torch.equal(flat.sequence_sum(values[kept]), sums[kept])
    assert torch.equal(flat.sequence_mean(values[kept]), means[kept])
    (gradient,) = torch.autograd.grad(flat.sequence_mean(flat.logprobs)[0], flat.logprobs)
    assert gradient.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])
    with pytest.raises(DataError, match="pass sequence_ids"):
        LossInputs(**packed).sequence_sum(values[kept])


seeds = st.integers(0, 10_000)
losses = st.sampled_from(ALL_LOSSES)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, loss=losses)
def test_masked_columns_can_be_dropped(seed: int, loss: Loss[Any]) -> None:
    ids = torch.arange(4).repeat_interleave(5)
    inputs = make_inputs(seed=seed, shape=(20,), sequence_ids=ids)
    kept = inputs.loss_mask != 0
    packed = LossInputs(
        **{name: value[kept] for name, value in vars_of(inputs).items() if isinstance(value, Tensor)}
    )
    assert loss(packed, kl_coefficient=0.1)[0].item() == pytest.approx(
        loss(inputs, kl_coefficient=0.1)[0].item(), rel=1e-10, abs=1e-12
    )
