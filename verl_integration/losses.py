"""Our losses where verl looks for losses: as policy losses by name, and as the loss of an engine.

================  =====================================  ==================================================
                  policy loss `atropos_<name>`           `engine_loss`
================  =====================================  ==================================================
chosen by         `actor.policy_loss.loss_mode`          `TrainingWorker.set_loss_fn`; our trainer does it
options           verl's (`clip_ratio_low`, ...)         section `loss` of ours, every option
denominator       verl's, by `loss_agg_mode`             ours, by `loss.reduction`: it comes with each row
KL, entropy       verl adds its own                      ours
================  =====================================  ==================================================

FSDP averages gradients over the ranks of data parallelism, so both multiply by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from trainer.config import LossSettings
from trainer.losses import LossInputs, resolve_loss
from trainer.options import LOSS_OPTIONS

POLICY_LOSS_PREFIX: Final = "atropos_"

# clip_cov and kl_cov choose tokens over the whole step, and decoupled_ppo is for one update of a batch: verl
# calls a policy loss with one micro-batch, as often as it likes, and has these itself.
POLICY_LOSSES: Final = tuple(
    name for name in LOSS_OPTIONS if name not in ("clip_cov", "kl_cov", "decoupled_ppo")
)
"""Our losses that verl can call one micro-batch at a time."""

# Our option: the one of verl's actor that says the same.
_OPTIONS_OF_VERL: Final = {
    "epsilon_low": "clip_ratio_low",
    "epsilon_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
    "temperature_positive": "tau_pos",
    "temperature_negative": "tau_neg",
}


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What every row of a step shares, and the loss of each micro-batch needs."""

    has_sampler: bool
    """Whether every row came with the sampler's log-probs."""
    tokens: float
    """Trained tokens of all rows: what sums for the metrics are divided by."""
    statistics: Any = None
    """See `LossInputs`."""
    staleness: int | None = None
    """See `LossInputs`."""


def engine_loss(settings: LossSettings) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return our loss as verl's engines call it; it travels to the workers as settings in text.

    A loss itself is found by its name there, and cannot be pickled.
    """
    return partial(compute_engine_loss, settings.model_dump_json())


def compute_engine_loss(
    settings: str, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss of a micro-batch and its metrics.

    Args:
        settings: Section `loss`, as JSON.
        model_output: Of the engine; `log_probs` is jagged, its entry t speaks of token t + 1.
        data: Rows as `verl_integration.batches` makes them.
        dp_group: Not needed: the denominators are those of the whole step.
    """
    loss_settings = _read_settings(settings)
    facts: StepFacts = data["atropos"]
    fields = ["response_mask", "advantages", "old_log_probs"]
    fields += ["ref_log_prob"] if "ref_log_prob" in data.keys() else []  # noqa: SIM118 - a TensorDict
    rows = data.select(*fields).to_padded_tensor()
    inputs = LossInputs(
        logprobs=no_padding_2_padding(model_output["log_probs"], data).float(),  # [B, R], of each token
        advantages=rows["advantages"],
        loss_mask=rows["response_mask"],
        inference_logprobs=rows["old_log_probs"] if facts.has_sampler else None,
        ref_logprobs=rows.get("ref_log_prob", None),
        denominator=data["denominators"][:, None],
        staleness=facts.staleness,
        statistics=facts.statistics,
    )
    loss, sums = loss_settings.bound(inputs)
    # Verl averages over ranks, losses and metrics, and adds up micro-batches.
    ranks = int(data["dp_size"])
    discount = loss_settings.staleness_discount ** max(0, facts.staleness or 0)
    metrics = {
        name: Metric(AggregationType.SUM, value * ranks / facts.tokens) for name, value in sums.items()
    }
    return loss * discount * ranks, metrics


@cache
def _read_settings(settings: str) -> LossSettings:
    return LossSettings.model_validate_json(settings)


def register_policy_losses() -> None:
    """Register every loss of `POLICY_LOSSES` under `atropos_<name>`."""
    for name in POLICY_LOSSES:
        register_policy_loss(POLICY_LOSS_PREFIX + name)(partial(compute_policy_loss, name))


def compute_policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute a loss of ours by its name as verl computes a policy loss, of tensors [B, R].

    The options that its actor has too are verl's; those that it leaves out have our default.
    """
    info: Mapping[str, Any] = getattr(config, "global_batch_info", None) or {}
    mask = response_mask.to(log_prob.dtype)
    inputs = LossInputs(
        logprobs=log_prob.float(),
        advantages=advantages,
        loss_mask=mask if rollout_is_weights is None else mask * rollout_is_weights,
        inference_logprobs=old_log_prob,
        denominator=_denominators(response_mask, loss_agg_mode, info),
    )
    known = set(_OPTIONS_OF_VERL) & set(LOSS_OPTIONS[name].model_fields)
    given = {ours: getattr(config, _OPTIONS_OF_VERL[ours], None) for ours in known}
    options = {ours: value for ours, value in given.items() if value is not None}
    loss, sums = resolve_loss(name, **options)(inputs)
    tokens = max(1.0, float(inputs.mask.sum()))
    metrics = {f"actor/{measured}": float(value) / tokens for measured, value in sums.items()}
    return loss, metrics


def _denominators(mask: Tensor, mode: str, info: Mapping[str, Any]) -> Tensor:
    """Return what verl's reduction divides the loss of each token by, over its ranks' average, [B, R].

    Its `agg_loss` is linear in the tokens' losses, so each token's weight in it is its derivative.

    Raises:
        ValueError: There is no such mode.
    """
    with torch.enable_grad():
        losses = torch.ones(mask.shape, device=mask.device, requires_grad=True)
        (weights,) = torch.autograd.grad(agg_loss(losses, mask, mode, **info), losses)
    return torch.where(mask.bool(), 1 / weights, 1.0)
