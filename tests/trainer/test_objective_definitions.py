"""Objectives against their formulas, written token by token in plain Python floats: value and gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

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
