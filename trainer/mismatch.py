"""How far the sampler's log-probs are from the trainer's own, at the same tokens, on every batch.

Verification asks fixed texts after a publish; this asks what the environments really trained on. With equal
weights the two differ by rounding only, so a large difference means that rollouts came from other weights,
from another kind of log-probs (scaled by a temperature, or cut by top-p), or from another tokenizer.

Data flow: micro-batch -> sums (on the device, added up over micro-batches and processes) -> `Mismatch` ->
metrics, and the alarm's verdict before the weights change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import TrainSettings
from trainer.losses import k3, log_ratio

LARGE_DIFFERENCE = 0.5
"""Nats, a factor of 1.65 in probability: beyond what rounding does to all but a few tokens."""

CAUSES = (
    "Causes seen: a server beside publish.servers, log-probs of another kind than loss.apply_temperature "
    "expects, top-p or top-k sampling with processed log-probs, another tokenizer or chat template"
)

_PREFIX = "mismatch/"


@torch.no_grad()
def mismatch_sums(logprobs: Tensor, sampled: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
    """What a micro-batch adds to the step's `Mismatch`.

    Args:
        logprobs: The trainer's, [N], in nats.
        sampled: The sampler's, [N], in nats; NaN where the environment sent none.
        loss_mask: [N]; tokens where it is 0 do not count.

    Returns:
        Sums over the tokens that count, 0-dim, always under the same names.
    """
    known = (loss_mask != 0) & ~sampled.isnan()
    # A selection before the arithmetic: 0 * NaN would be NaN.
    logs = torch.where(known, log_ratio(logprobs, sampled.to(logprobs.dtype)), torch.zeros_like(logprobs))
    return {
        f"{_PREFIX}tokens": known.sum().to(logprobs.dtype),
        f"{_PREFIX}difference": logs.abs().sum(),
        f"{_PREFIX}kl": k3(logs).sum(),
        f"{_PREFIX}large": (logs.abs() > LARGE_DIFFERENCE).sum().to(logprobs.dtype),
        f"{_PREFIX}ratio": torch.where(known, logs.exp(), torch.zeros_like(logs)).sum(),
    }


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Trainer against sampler, over the step's trained tokens that came with the sampler's log-probs."""

    tokens: int
    mean_difference: float
    """Mean of |trainer - sampler|, in nats."""
    kl: float
    """k3 estimate of KL(sampler || trainer), in nats."""
    large_share: float
    """Share of tokens that differ by more than `LARGE_DIFFERENCE`."""
    ratio: float
    """Mean of the trainer's probability over the sampler's."""

    def metrics(self) -> dict[str, float]:
        """For the step's row."""
        return {
            "mismatch_tokens": self.tokens,
            "mismatch_difference": self.mean_difference,
            "mismatch_kl": self.kl,
            "mismatch_large_share": self.large_share,
            "ratio": self.ratio,
        }


def take_mismatch(totals: dict[str, float]) -> Mismatch | None:
    """Take the sums of all micro-batches out of a step's totals; None if no token has log-probs."""
    sums = {name: totals.pop(_PREFIX + name) for name in ("tokens", "difference", "kl", "large", "ratio")}
    tokens = sums["tokens"]
    if not tokens:
        return None
    return Mismatch(
        tokens=round(tokens),
        mean_difference=sums["difference"] / tokens,
        kl=sums["kl"] / tokens,
        large_share=sums["large"] / tokens,
        ratio=sums["ratio"] / tokens,
    )


def alarm_text(mismatch: Mismatch | None, staleness: int | None, settings: TrainSettings) -> str | None:
    """What is alarming about a batch, in one sentence; None if nothing is, or it cannot be judged.

    Only batches of the current version are judged: in older ones the policy's own movement since then is
    part of the difference.

    Args:
        mismatch: Of the batch.
        staleness: Versions between the one that was served when the batch arrived and the trainer's; None
            if that is not known.
        settings: Section `train` of the configuration.
    """
    limit = settings.mismatch_alarm
    if mismatch is None or limit is None or staleness != 0 or mismatch.mean_difference <= limit:
        return None
    return (
        f"the sampler's log-probs differ from the trainer's by {mismatch.mean_difference:.3g} nats on "
        f"average over {mismatch.tokens} tokens (train.mismatch_alarm {limit:g}), {mismatch.large_share:.0%} "
        f"of them by more than {LARGE_DIFFERENCE:g}, though both should have the same weights. {CAUSES}"
    )


def drop_own_comparison(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loss's metrics without those that `Mismatch` has, which counts only tokens that have log-probs."""
    return {name: value for name, value in metrics.items() if name not in ("ratio", "mismatch_kl")}
