"""Measures how far the sampler's log-probs are from the trainer's own, at the same tokens.

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

from schemas import count_of
from trainer.config import TrainSettings
from trainer.losses import k3, log_ratio

LARGE_DIFFERENCE = 0.5
"""Nats, a factor of 1.65 in probability: beyond what rounding does to all but a few tokens."""

CAUSES = (
    "Causes seen: a server beside publish.servers, log-probs of another kind than loss.apply_temperature "
    "expects, top-p or top-k sampling with processed log-probs, another tokenizer or chat template, the "
    "placeholder tokens 0 to 127 that atroposlib's DummyManagedServer (server_type openai) sends"
)

_FIT_TOKENS = 64
_FIT_SHARE = 0.5  # of the squared differences that a temperature must explain to be named
_FIT_DEPARTURE = 0.03  # of the fitted temperature from the assumed one

_PREFIX = "mismatch/"


@torch.no_grad()
def mismatch_sums(logprobs: Tensor, sampled: Tensor, loss_mask: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """Sum up what a micro-batch adds to the step's `Mismatch`.

    At another temperature, 1 / (1 + b) of ours, a token's log-prob is by b (log-prob + entropy) larger, to
    first order in b: the regression of the differences on that tells the sampler's temperature, from 0.7 to
    1.3 to within 0.04; further away it is too near to ours.

    Args:
        logprobs: The trainer's, [N], in nats.
        sampled: The sampler's, [N], in nats; NaN where the environment sent none.
        loss_mask: [N]; tokens where it is 0 do not count.
        entropy: [N], of the trainer's distribution in the place of each token, in nats.

    Returns:
        Sums over the tokens that count, 0-dim, always under the same names.
    """
    known = (loss_mask != 0) & ~sampled.isnan()
    # A selection before the arithmetic: 0 * NaN would be NaN.
    zeros = torch.zeros_like(logprobs)
    logs = torch.where(known, log_ratio(logprobs, sampled.to(logprobs.dtype)), zeros)
    surplus = torch.where(known, logprobs + entropy, zeros)
    return {
        f"{_PREFIX}tokens": known.sum().to(logprobs.dtype),
        f"{_PREFIX}difference": logs.abs().sum(),
        f"{_PREFIX}kl": k3(logs).sum(),
        f"{_PREFIX}large": (logs.abs() > LARGE_DIFFERENCE).sum().to(logprobs.dtype),
        f"{_PREFIX}ratio": torch.where(known, logs.exp(), zeros).sum(),
        f"{_PREFIX}ratio_squared": torch.where(known, (2 * logs).exp(), zeros).sum(),
        f"{_PREFIX}squared": logs.square().sum(),
        f"{_PREFIX}surplus_squared": surplus.square().sum(),
        f"{_PREFIX}product": -(logs * surplus).sum(),
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
    effective_share: float = 1.0
    """Effective sample size of the tokens under these ratios as weights, over their number (Kish 1965): 1 if
    all are equal, near 0 if few tokens outweigh all others."""
    fitted_temperature: float = 1.0
    """Sampling temperature over the assumed one that fits the differences best; 1 where none fits."""
    explained_share: float = 0.0
    """Share of the squared differences that this temperature explains."""

    def metrics(self) -> dict[str, float]:
        """For the step's row."""
        return {
            "mismatch_tokens": self.tokens,
            "mismatch_difference": self.mean_difference,
            "mismatch_kl": self.kl,
            "mismatch_large_share": self.large_share,
            "ratio": self.ratio,
            "effective_sample_share": self.effective_share,
        }


def take_mismatch(totals: dict[str, float]) -> Mismatch | None:
    """Take the sums of all micro-batches out of a step's totals; None if no token has log-probs."""
    sums = {name.removeprefix(_PREFIX): totals.pop(name) for name in list(totals) if name.startswith(_PREFIX)}
    tokens = sums["tokens"]
    if not tokens:
        return None
    slope, explained = 0.0, 0.0
    if sums["squared"] and sums["surplus_squared"]:
        slope = sums["product"] / sums["surplus_squared"]
        explained = slope * sums["product"] / sums["squared"]
    return Mismatch(
        tokens=round(tokens),
        mean_difference=sums["difference"] / tokens,
        kl=sums["kl"] / tokens,
        large_share=sums["large"] / tokens,
        ratio=sums["ratio"] / tokens,
        effective_share=sums["ratio"] ** 2 / (tokens * sums["ratio_squared"]),
        fitted_temperature=1 / (1 + slope) if slope > -1 else 1.0,
        explained_share=explained if slope > -1 else 0.0,
    )


def temperature_text(mismatch: Mismatch | None, staleness: int | None) -> str | None:
    """Name another sampling temperature than the assumed one, if that explains the differences.

    As `alarm_text`, it judges only batches of the current version.
    """
    if mismatch is None or staleness != 0 or mismatch.tokens < _FIT_TOKENS:
        return None
    if mismatch.explained_share < _FIT_SHARE or abs(mismatch.fitted_temperature - 1) < _FIT_DEPARTURE:
        return None
    return (
        f"the sampler's log-probs are those of about {mismatch.fitted_temperature:.2g} times the temperature "
        f"that is assumed (it explains {mismatch.explained_share:.0%} of the squared differences; mean ratio "
        f"{mismatch.ratio:.3f}). Set data.sampling_temperature to what the environment samples at; if it is "
        "that already, the server sends raw log-probs: set loss.apply_temperature false, or let it send "
        "processed ones"
    )


def alarm_text(mismatch: Mismatch | None, staleness: int | None, settings: TrainSettings) -> str | None:
    """Say in one sentence what is alarming about a batch; None if nothing is, or it cannot be judged.

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
        f"average over {count_of(mismatch.tokens, 'token')} (train.mismatch_alarm {limit:g}), "
        f"{mismatch.large_share:.0%} of them by more than {LARGE_DIFFERENCE:g}, though both should have the "
        f"same weights. {CAUSES}"
    )


def unjudged_text(mismatch: Mismatch | None, staleness: int | None, settings: TrainSettings) -> str | None:
    """Say of a batch that would be alarming that it is not judged, as it may be of any version."""
    if staleness is not None or mismatch is None or alarm_text(mismatch, 0, settings) is None:
        return None
    return (
        f"the sampler's log-probs differ from the trainer's by {mismatch.mean_difference:.3g} nats on "
        "average. Which version it had is not known (publish.transport none, or a recording that does not "
        "say), so train.mismatch_alarm and train.mismatch_action judge neither this batch nor others like it"
    )


def drop_own_comparison(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loss's metrics without those that `Mismatch` has, which counts only tokens that have log-probs."""
    return {name: value for name, value in metrics.items() if name not in ("ratio", "mismatch_kl")}
