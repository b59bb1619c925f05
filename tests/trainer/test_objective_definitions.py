"""Objectives against their formulas, written token by token in plain Python floats: value and gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from trainer.losses import LossInputs, resolve_loss


@dataclass
class Sequence:
    """The trained tokens of one sequence."""

    policy: list[float]
    """Log-probs of the trainer."""
    sampler: list[float]
    reference: list[float]
    advantages: list[float]

    @property
    def differences(self) -> list[float]:
        return [policy - sampler for policy, sampler in zip(self.policy, self.sampler, strict=True)]

    @property
    def mean_difference(self) -> float:
        return sum(self.differences) / len(self.policy)


AGE = 3
"""Versions between sampler and policy."""

Terms = tuple[list[float], list[float]]
"""The term of each token, and the derivative of their sum by the log-prob of each token."""


def ragged_batch(seed: int, sequences: int = 12) -> list[Sequence]:
    """Sequences of one to seven tokens, whose ratios lie on both sides of every bound."""
    draw = random.Random(seed)
    batch = []
    for _ in range(sequences):
        length, spread = draw.randint(1, 7), draw.choice([0.01, 0.5, 3.0])
        sampler = [-abs(draw.gauss(0, 1.5)) - 1e-3 for _ in range(length)]
        policy = [min(each + draw.gauss(0, spread), -1e-3) for each in sampler]
        reference = [each + draw.gauss(0, 0.5) for each in policy]
        sign = draw.choice([1, -1])
        advantages = [sign * abs(draw.gauss(0, 1)) for _ in range(length)]
        batch.append(Sequence(policy, sampler, reference, advantages))
    return batch


def loss_inputs(batch: list[Sequence], denominator: float) -> LossInputs:
    """The batch packed into one row."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([x for each in batch for x in getattr(each, name)], dtype=torch.float64)

    ids = torch.arange(len(batch)).repeat_interleave(torch.tensor([len(each.policy) for each in batch]))
    return LossInputs(
        logprobs=column("policy").requires_grad_(),
        advantages=column("advantages"),
        loss_mask=torch.ones(len(ids)),
        inference_logprobs=column("sampler"),
        ref_logprobs=column("reference"),
        sequence_ids=ids,
        denominator=denominator,
        staleness=AGE,
    )


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def cispo(each: Sequence) -> Terms:
    weights = [clip(math.exp(difference), 0.5, 1.5) for difference in each.differences]
    gradient = [-weight * advantage for weight, advantage in zip(weights, each.advantages, strict=True)]
    return [slope * policy for slope, policy in zip(gradient, each.policy, strict=True)], gradient


def gspo(each: Sequence, low: float = 0.9, high: float = 1.2) -> Terms:
    ratio = math.exp(each.mean_difference)
    terms, slopes = [], []
    for advantage in each.advantages:
        free, bounded = ratio * advantage, clip(ratio, low, high) * advantage
        terms.append(-min(free, bounded))
        slopes.append(-free if free <= bounded else 0.0)
    return terms, [sum(slopes) / len(slopes)] * len(slopes)


def gspo_token(each: Sequence) -> Terms:
    terms, _ = gspo(each)
    ratio = math.exp(each.mean_difference)
    free = [ratio * advantage <= clip(ratio, 0.9, 1.2) * advantage for advantage in each.advantages]
    return terms, [-ratio * a if is_free else 0.0 for a, is_free in zip(each.advantages, free, strict=True)]


def ppo_clip(each: Sequence, dual: float = math.inf, two_sided: float = math.inf) -> Terms:
    terms, slopes = [], []
    for difference, advantage in zip(each.differences, each.advantages, strict=True):
        ratio = math.exp(difference)
        if advantage >= 0:
            stopped = ratio > 1.3
            terms.append(-(1.3 if stopped else ratio) * advantage)
        else:
            limit = min(dual, two_sided)
            stopped = ratio < 0.8 or ratio > limit
            terms.append(-clip(ratio, 0.8, limit) * advantage)
        slopes.append(0.0 if stopped else -ratio * advantage)
    return terms, slopes


def decoupled_ppo(each: Sequence) -> Terms:
    """In the only update of a batch: the ratio is 1, and only weighs by the sampler's."""
    weights = [min(math.exp(difference), 5.0) for difference in each.differences]
    slopes = [-weight * advantage for weight, advantage in zip(weights, each.advantages, strict=True)]
    return slopes, slopes


def interpolated_decoupled_ppo(each: Sequence) -> Terms:
    """The clip bounds one of the versions that lie between sampler and policy; the others weigh."""
    terms, slopes = [], []
    for difference, advantage in zip(each.differences, each.advantages, strict=True):
        weight, ratio = min(math.exp(difference * (AGE - 1) / AGE), 5.0), math.exp(difference / AGE)
        bound = 1.3 if advantage >= 0 else 0.8
        stopped = ratio > bound if advantage >= 0 else ratio < bound
        terms.append(-weight * (bound if stopped else ratio) * advantage)
        slopes.append(0.0 if stopped else -weight * ratio * advantage)
    return terms, slopes


def sapo(each: Sequence) -> Terms:
    terms, slopes = [], []
    for difference, advantage in zip(each.differences, each.advantages, strict=True):
        ratio, temperature = math.exp(difference), 1.0 if advantage > 0 else 1.05
        gate = 1 / (1 + math.exp(-temperature * (ratio - 1)))
        terms.append(-4 / temperature * gate * advantage)
        slopes.append(-4 * gate * (1 - gate) * ratio * advantage)
    return terms, slopes


def gmpo(each: Sequence) -> Terms:
    inside, clipped = [], []
    for difference, advantage in zip(each.differences, each.advantages, strict=True):
        bounded = min(difference, 0.3) if advantage > 0 else max(difference, -0.2)
        clipped.append(bounded)
        inside.append(bounded == difference)
    length = len(clipped)
    term = -sum(each.advantages) / length * math.exp(sum(clipped) / length)
    return [term] * length, [term if is_inside else 0.0 for is_inside in inside]


def luspo(each: Sequence) -> Terms:
    terms, slopes = gspo(each)
    return [len(terms) * term for term in terms], [len(terms) * slope for slope in slopes]


def vespo(each: Sequence) -> Terms:
    weight = math.exp(clip(sum(each.differences), math.log(1e-8), 20))
    slopes = []
    for advantage in each.advantages:
        power, rate = (2, 3) if advantage >= 0 else (3, 2)
        slopes.append(-math.exp(rate + power * math.log(weight) - rate * weight) * advantage)
    return [slope * policy for slope, policy in zip(slopes, each.policy, strict=True)], slopes


def binary_kl(before: float, now: float) -> float:
    others = (1 - math.exp(before) + 1e-8) / (1 - math.exp(now) + 1e-8)
    return math.exp(before) * (before - now) + (1 - math.exp(before)) * math.log(others)


def dppo_kl_keeps(policy: float, sampler: float, advantage: float) -> bool:
    toward = policy > sampler if advantage > 0 else policy < sampler
    return not toward or binary_kl(sampler, policy) <= 0.05


def tv_keeps(policy: float, sampler: float, advantage: float) -> bool:
    change = math.exp(policy) - math.exp(sampler)
    return change <= 0.15 if advantage > 0 else change >= -0.1


def ipo_keeps(policy: float, sampler: float, advantage: float) -> bool:
    return abs(math.exp(policy) - math.exp(sampler)) <= 0.1


def masked_policy_gradient(each: Sequence, keeps: Callable[[float, float, float], bool]) -> Terms:
    slopes = [
        -min(math.exp(policy - sampler), 20.0) * advantage if keeps(policy, sampler, advantage) else 0.0
        for policy, sampler, advantage in zip(each.policy, each.sampler, each.advantages, strict=True)
    ]
    return [slope * policy for slope, policy in zip(slopes, each.policy, strict=True)], slopes


def penalized_surrogate(
    each: Sequence, keeps: Callable[[float, float, float], bool], cap: float = math.inf
) -> Terms:
    terms, slopes = [], []
    for policy, sampler, advantage in zip(each.policy, each.sampler, each.advantages, strict=True):
        ratio = min(math.exp(policy - sampler), cap)
        kept = -ratio * advantage if keeps(policy, sampler, advantage) else 0.0
        terms.append(kept + 0.01 * (policy - sampler) ** 2)
        slopes.append(kept + 0.02 * (policy - sampler))
    return terms, slopes


def weighted(each: Sequence, weights: list[float]) -> Terms:
    """Advantage-weighted cross-entropy times a correction."""
    slopes = [-weight * advantage for weight, advantage in zip(weights, each.advantages, strict=True)]
    return [slope * policy for slope, policy in zip(slopes, each.policy, strict=True)], slopes


def icepop(each: Sequence) -> Terms:
    ratios = [math.exp(difference) for difference in each.differences]
    return weighted(each, [ratio if 0.5 <= ratio <= 2 else 0.0 for ratio in ratios])


def sequence_tis(each: Sequence) -> Terms:
    return weighted(each, [min(math.exp(sum(each.differences)), 1.7)] * len(each.policy))


def token_tis(each: Sequence) -> Terms:
    return weighted(each, [min(math.exp(difference), 1.7) for difference in each.differences])


ESTIMATES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(d) - 1 - d,
}


def rejection(level: str, estimator: str) -> Callable[[Sequence], Terms]:
    def terms(each: Sequence) -> Terms:
        estimates = [ESTIMATES[estimator](difference) for difference in each.differences]
        length = len(estimates)
        if level == "sequence_sum":
            estimates = [sum(estimates)] * length
        elif level == "sequence_mean":
            estimates = [sum(estimates) / length] * length
        elif level == "sequence_max":
            estimates = [max(estimates)] * length
        lowest = -0.2 if estimator == "k1" else -math.inf
        return weighted(each, [float(lowest <= estimate <= 0.3) for estimate in estimates])

    return terms


def off_policy_mask(each: Sequence) -> Terms:
    near = -each.mean_difference <= 0.1
    return weighted(each, [float(near or advantage >= 0) for advantage in each.advantages])


def corrected(**correction: object) -> tuple[str, dict[str, object]]:
    return "weighted_sft", {"correction": correction}


MODES: dict[str, tuple[str, dict[str, object], Callable[[Sequence], Terms]]] = {
    "ppo_clip": ("ppo_clip", {"epsilon_high": 0.3}, ppo_clip),
    "dual clip": (
        *("ppo_clip", {"epsilon_high": 0.3, "dual_clip": 3.0}),
        lambda each: ppo_clip(each, dual=3.0),
    ),
    "two-sided clip": (
        *("ppo_clip", {"epsilon_high": 0.3, "two_sided": 4.0}),
        lambda each: ppo_clip(each, two_sided=4.0),
    ),
    "gspo": ("gspo", {"epsilon_low": 0.1, "epsilon_high": 0.2}, gspo),
    "gspo, token form": ("gspo", {"epsilon_low": 0.1, "epsilon_high": 0.2, "form": "token"}, gspo_token),
    "cispo": ("cispo", {"epsilon_low": 0.5, "epsilon_high": 0.5}, cispo),
    "decoupled_ppo": ("decoupled_ppo", {"ratio_cap": 5.0}, decoupled_ppo),
    "decoupled_ppo, interpolated": (
        *("decoupled_ppo", {"epsilon_high": 0.3, "ratio_cap": 5.0, "proximal": "interpolated"}),
        interpolated_decoupled_ppo,
    ),
    "sapo": ("sapo", {}, sapo),
    "gmpo": ("gmpo", {"epsilon_low": 0.2, "epsilon_high": 0.3}, gmpo),
    "luspo": ("luspo", {"epsilon_low": 0.1, "epsilon_high": 0.2}, luspo),
    "vespo": ("vespo", {}, vespo),
    "dppo_tv": (
        *("dppo_tv", {"epsilon_low": 0.1, "epsilon_high": 0.15}),
        lambda each: masked_policy_gradient(each, tv_keeps),
    ),
    "dppo_kl": ("dppo_kl", {}, lambda each: masked_policy_gradient(each, dppo_kl_keeps)),
    "prime": (
        *("prime", {"epsilon_low": 0.1, "epsilon_high": 0.15, "mismatch_penalty": 0.01}),
        lambda each: penalized_surrogate(each, tv_keeps),
    ),
    "ipo, capped": (
        *("ipo", {"mismatch_penalty": 0.01, "ratio_cap": 1.2}),
        lambda each: penalized_surrogate(each, ipo_keeps, cap=1.2),
    ),
    "ipo": ("ipo", {"mismatch_penalty": 0.01}, lambda each: penalized_surrogate(each, ipo_keeps)),
    "token TIS": (*corrected(weight="token_tis", ratio_cap=1.7), token_tis),
    "sequence TIS": (*corrected(weight="sequence_tis", ratio_cap=1.7), sequence_tis),
    "IcePop": (*corrected(weight="icepop", icepop_low=0.5, icepop_high=2.0), icepop),
    "off-policy sequence mask": (*corrected(off_policy_limit=0.1), off_policy_mask),
    **{
        f"rejection by {level} {estimator}": (
            *corrected(reject=level, reject_estimator=estimator, reject_above=0.3, **bound),
            rejection(level, estimator),
        )
        for level in ("token", "sequence_sum", "sequence_mean", "sequence_max")
        for estimator, bound in (("k1", {"reject_below": -0.2}), ("k2", {}), ("k3", {}))
        if (level, estimator) != ("sequence_max", "k1")
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_formula(mode: str, seed: int) -> None:
    name, options, definition = MODES[mode]
    batch = ragged_batch(seed)
    inputs = loss_inputs(batch, denominator=7.0)
    value, _ = resolve_loss(name, **options)(inputs)
    (gradient,) = torch.autograd.grad(value, inputs.logprobs)
    parts = [definition(each) for each in batch]
    assert value.item() == pytest.approx(sum(sum(terms) for terms, _ in parts) / 7, rel=1e-12)
    expected = [slope / 7 for _, slopes in parts for slope in slopes]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("staleness", [None, 0, 1])
def test_the_interpolated_proximal_policy_of_young_samples_is_the_sampler(staleness: int | None) -> None:
    inputs = replace(loss_inputs(ragged_batch(5), denominator=7.0), staleness=staleness)
    found = []
    for bound in (resolve_loss("ppo_clip"), resolve_loss("decoupled_ppo", proximal="interpolated")):
        value, metrics = bound(inputs)
        (gradient,) = torch.autograd.grad(value, inputs.logprobs)
        found.append((value.item(), gradient.tolist(), metrics["clipped"].item()))
    assert found[0] == found[1]
    assert found[0][2] > 0


def kl_estimates(estimator: str, x: float, difference: float) -> tuple[float, float]:
    """The estimate of one token and its derivative by the log-prob, x = log(reference / policy)."""
    k3 = math.exp(x) - 1 - x
    return {
        "k1": (-x, 1.0),
        "k2": (x * x / 2, -x),
        "k3": (k3, 1 - math.exp(x)),
        "k3_gradient_k2": (k3, -x),
        "k3_unbiased": (k3 * math.exp(difference), (k3 + 1 - math.exp(x)) * math.exp(difference)),
    }[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_gradient_k2", "k3_unbiased"])
@pytest.mark.parametrize("cap", [None, 0.05])
def test_the_penalty_towards_the_reference_is_the_estimate_that_was_chosen(
    estimator: str, cap: float | None
) -> None:
    batch = ragged_batch(3)
    inputs = loss_inputs(batch, denominator=7.0)
    plain, _ = resolve_loss("weighted_sft")(inputs)
    value, metrics = resolve_loss("weighted_sft", kl_coefficient=0.3, kl_estimator=estimator, kl_cap=cap)(
        inputs
    )
    (gradient,) = torch.autograd.grad(value - plain, inputs.logprobs)
    total, expected, metric = 0.0, [], 0.0
    for each in batch:
        for policy, reference, difference in zip(each.policy, each.reference, each.differences, strict=True):
            x = reference - policy
            estimate, slope = kl_estimates(estimator, x, difference)
            ratio = math.exp(difference) if estimator == "k3_unbiased" else 1.0
            if cap is not None and estimate / ratio > cap:
                estimate = cap * ratio
                slope = {"k3_gradient_k2": -x, "k3_unbiased": estimate}.get(estimator, 0.0)
            total += estimate
            expected.append(0.3 * slope / 7)
            metric += math.exp(x) - 1 - x
    assert (value - plain).item() == pytest.approx(0.3 * total / 7, rel=1e-10)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert metrics["kl_ref"].item() == pytest.approx(metric, rel=1e-10)


def covariances(batch: list[Sequence]) -> list[float]:
    advantages = [advantage for each in batch for advantage in each.advantages]
    logprobs = [logprob for each in batch for logprob in each.policy]
    mean_advantage, mean_logprob = sum(advantages) / len(advantages), sum(logprobs) / len(logprobs)
    return [(a - mean_advantage) * (b - mean_logprob) for a, b in zip(advantages, logprobs, strict=True)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.001, 0.2])
def test_the_tokens_of_the_largest_covariance_are_held_back(seed: int, share: float) -> None:
    batch = ragged_batch(seed)
    covariance = covariances(batch)
    count = max(1, int(share * len(covariance)))
    plain = Sequence([], [], [], [])
    for each in batch:
        for name in vars(plain):
            getattr(plain, name).extend(getattr(each, name))
    # kl_cov: the largest are penalised
    largest = sorted(covariance)[-count]
    slopes = [-math.exp(d) * a for d, a in zip(plain.differences, plain.advantages, strict=True)]
    for index, difference in enumerate(plain.differences):
        if covariance[index] >= largest:
            slopes[index] += 0.5 * math.copysign(1, difference)
    inputs = loss_inputs(batch, denominator=7.0)
    value, metrics = resolve_loss("kl_cov", covariance_share=share, covariance_penalty=0.5)(inputs)
    (gradient,) = torch.autograd.grad(value, inputs.logprobs)
    assert gradient.tolist() == pytest.approx([slope / 7 for slope in slopes], rel=1e-10, abs=1e-14)
    assert metrics["penalized"].item() == count
    # clip_cov: the largest that the clip leaves, within bounds, lose their gradient
    terms, slopes = ppo_clip(plain)
    able = [0.1 < c < 1.0 and slope != 0 for c, slope in zip(covariance, slopes, strict=True)]
    among = sorted(c for c, is_able in zip(covariance, able, strict=True) if is_able)[-count:]
    for index, is_able in enumerate(able):
        if is_able and covariance[index] >= among[0]:
            terms[index] = slopes[index] = 0.0
    bounds = {"covariance_low": 0.1, "covariance_high": 1.0, "epsilon_high": 0.3}
    value, metrics = resolve_loss("clip_cov", covariance_share=share, **bounds)(inputs)
    (gradient,) = torch.autograd.grad(value, inputs.logprobs)
    assert value.item() == pytest.approx(sum(terms) / 7, rel=1e-10)
    assert gradient.tolist() == pytest.approx([slope / 7 for slope in slopes], rel=1e-10, abs=1e-14)
    assert metrics["masked"].item() == len(among)


@pytest.mark.parametrize("trainer_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.001, 0.2])
@pytest.mark.parametrize(("name", "metric"), [("clip_cov", "masked"), ("kl_cov", "penalized")])
def test_a_step_chooses_by_the_samplers_covariance_however_it_is_cut(
    name: str, metric: str, share: float, trainer_dtype: torch.dtype
) -> None:
    """Its threshold is one token's own value, so a comparison with another would miss it."""
    bounds = {"covariance_low": -1e8, "covariance_high": 1e8} if name == "clip_cov" else {}
    bound = resolve_loss(name, covariance_share=share, **bounds)
    for seed in range(8):
        batch = ragged_batch(seed)
        columns = {
            column: getattr(loss_inputs(batch, denominator=7.0), column).detach().float()
            for column in ("logprobs", "advantages", "loss_mask", "inference_logprobs")
        }
        assert bound.step_statistics is not None
        before = LossInputs(**(columns | {"logprobs": columns["inference_logprobs"]}))
        statistics = bound.step_statistics(before, bound.options)
        columns["logprobs"] = columns["logprobs"].to(trainer_dtype)
        found = 0.0
        for start in range(0, len(columns["logprobs"]), 5):
            part = {column: values[start : start + 5] for column, values in columns.items()}
            found += bound(LossInputs(**part, statistics=statistics))[1][metric].item()
        assert found == max(1, int(share * len(columns["logprobs"])))


def test_the_token_that_a_step_holds_back_is_the_samplers_largest() -> None:
    """Under the trainer's log-probs it would be the first one, which the clip stops anyway."""
    columns = {
        "advantages": torch.tensor([1.0, 1.0, -1.0, -1.0]),
        "loss_mask": torch.ones(4),
        "inference_logprobs": torch.tensor([-2.0, -0.1, -0.5, -0.6]),
    }
    bound = resolve_loss("clip_cov", covariance_share=0.25, covariance_low=0.0, covariance_high=9.0)
    assert bound.step_statistics is not None
    before = LossInputs(logprobs=columns["inference_logprobs"], **columns)
    logprobs = torch.tensor([-0.01, -0.12, -0.5, -0.6], requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs, denominator=1.0, statistics=bound.step_statistics(before, bound.options), **columns
    )
    value, metrics = bound(inputs)
    value.backward()
    assert metrics["masked"].item() == 1
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0])


def test_a_mask_of_the_correction_takes_the_term_and_leaves_the_penalty_and_the_denominator() -> None:
    batch = ragged_batch(1)
    inputs = loss_inputs(batch, denominator=7.0)
    correction = {"reject": "token", "reject_estimator": "k2", "reject_above": 1e-30}
    value, metrics = resolve_loss("weighted_sft", kl_coefficient=0.5, correction=correction)(inputs)
    assert metrics["masked"].item() == inputs.loss_mask.sum().item()
    assert value.item() == pytest.approx(0.5 * metrics["kl_ref"].item() / 7)
    masks = correction | {"reject_above": 0.05}
    _, metrics = resolve_loss("dppo_tv", correction=masks)(inputs)
    _, of_loss = resolve_loss("dppo_tv")(inputs)
    assert metrics["masked"] > of_loss["masked"]
