"""Every objective learns a bandit from samples two versions old, and unlearns it with its sign flipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.extensions import BUILT_IN_LOSSES
from trainer.losses import LossInputs, resolve_loss

TARGETS = torch.tensor([3, 5, 0])
"""The token that is rewarded, at each of three positions; eight can be chosen, so chance is 12.5%."""
CHOICES, SEQUENCES, STALENESS = 8, 64, 2

WIDER = {"epsilon_low": 0.2, "epsilon_high": 0.3}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BUILT_IN_LOSSES if name not in ("gspo", "luspo")},
    "gspo": ("gspo", WIDER),
    "gspo, token form": ("gspo", {**WIDER, "form": "token"}),
    "luspo": ("luspo", WIDER),
    "decoupled_ppo, interpolated": ("decoupled_ppo", {"proximal": "interpolated"}),
    "ipo, capped": ("ipo", {"epsilon": 0.3, "mismatch_penalty": 0.0, "ratio_cap": 1e4}),
    "dual clip": ("ppo_clip", {"dual_clip": 3.0}),
    "two-sided clip": ("ppo_clip", {"two_sided": 4.0}),
    "clip_cov of a tenth": ("clip_cov", {"covariance_share": 0.1, "covariance_low": 0.1}),
    "kl_cov of a tenth": ("kl_cov", {"covariance_share": 0.1, "covariance_penalty": 0.1}),
    "token TIS": ("weighted_sft", {"correction": {"weight": "token_tis"}}),
    "sequence TIS": ("weighted_sft", {"correction": {"weight": "sequence_tis"}}),
    "IcePop": ("weighted_sft", {"correction": {"weight": "icepop"}}),
    "rejection of tokens": ("policy_gradient", {"correction": {"reject": "token"}}),
    "rejection of sequences": (
        *("policy_gradient", {"correction": {"reject": "sequence_max", "reject_estimator": "k3"}}),
    ),
    "off-policy sequence mask": ("policy_gradient", {"correction": {"off_policy_limit": 0.1}}),
    **{
        f"KL penalty {estimator}": ("ppo_clip", {"kl_coefficient": 0.01, "kl_estimator": estimator})
        for estimator in ("k1", "k2", "k3", "k3_gradient_k2", "k3_unbiased")
    },
}


def reward_after_training(name: str, options: dict[str, Any], *, steps: int, sign: float) -> float:
    """Train a softmax policy with one row of logits for each position; return its expected reward."""
    generator = torch.Generator().manual_seed(0)
    loss = resolve_loss(name, **options)
    logits = torch.zeros((len(TARGETS), CHOICES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    versions = [logits.detach().clone()] * (STALENESS + 1)
    for _ in range(steps):
        sampler = versions[-1 - STALENESS].log_softmax(-1)
        tokens = torch.multinomial(sampler.exp(), SEQUENCES, replacement=True, generator=generator)  # [3, S]
        rewards = (tokens == TARGETS[:, None]).double().mean(0)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        value, _ = loss(
            LossInputs(
                logprobs=logits.log_softmax(-1).gather(1, tokens).T,
                advantages=advantages[:, None].expand(SEQUENCES, len(TARGETS)),
                loss_mask=torch.ones(SEQUENCES, len(TARGETS)),
                inference_logprobs=sampler.gather(1, tokens).T,
                ref_logprobs=versions[0].log_softmax(-1).gather(1, tokens).T,
                staleness=STALENESS,
            )
        )
        optimizer.zero_grad()
        (sign * value).backward()
        optimizer.step()
        versions.append(logits.detach().clone())
    probabilities = logits.detach().softmax(-1)
    return float(probabilities[torch.arange(len(TARGETS)), TARGETS].mean())


@pytest.mark.parametrize("mode", MODES)
def test_the_reward_rises_from_chance_to_nine_tenths(mode: str) -> None:
    assert reward_after_training(*MODES[mode], steps=100, sign=1.0) > 0.9


@pytest.mark.parametrize("mode", MODES)
def test_with_the_sign_flipped_it_does_not(mode: str) -> None:
    assert reward_after_training(*MODES[mode], steps=30, sign=-1.0) < 0.1
