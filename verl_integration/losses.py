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
from functools import cache, partial
from typing import Any, Final

import torch
import verl.utils.tensordict_utils as tu
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from trainer.config import LossSettings
from trainer.losses import LossInputs, resolve_loss
from trainer.options import LOSS_OPTIONS

# clip_cov and kl_cov choose tokens over the whole step, and decoupled_ppo is for one update of a batch: verl
# calls a policy loss with one micro-batch, as often as it likes, and has these itself.
POLICY_LOSSES: Final = tuple(
    name for name in LOSS_OPTIONS if name not in ("clip_cov", "kl_cov", "decoupled_ppo")
)
"""Our losses that verl can call one micro-batch at a time; registered under `atropos_<name>`."""

# Our option: the one of verl's actor that says the same.
_OPTIONS_OF_VERL: Final = {
    "epsilon_low": "clip_ratio_low",
    "epsilon_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
    "temperature_positive": "tau_pos",
    "temperature_negative": "tau_neg",
}


def engine_loss(settings: LossSettings) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return our loss as verl's engines call it; it travels to the workers as settings in text."""
    return partial(_compute_engine_loss, settings.model_dump_json())


def _compute_engine_loss(
    settings: str, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss of a micro-batch of `verl_integration.batches`, and its metrics."""
    loss_settings, staleness = _read_settings(settings), tu.get(data, "staleness")
    columns = ("response_mask", "advantages", "old_log_probs", "ref_log_prob")
    rows = data.select(*columns, strict=False).to_padded_tensor()
    inputs = LossInputs(
        logprobs=no_padding_2_padding(model_output["log_probs"], data).float(),  # [B, R], of each token
        advantages=rows["advantages"],
        loss_mask=rows["response_mask"],
        inference_logprobs=rows.get("old_log_probs", None),
        ref_logprobs=rows.get("ref_log_prob", None),
        denominator=data["denominators"][:, None],
        staleness=staleness,
        statistics=tu.get(data, "statistics"),
    )
    loss, sums = loss_settings.bound(inputs)
    # Verl averages over ranks, losses and metrics, and adds up micro-batches.
    ranks = int(data["dp_size"])
    discount = loss_settings.staleness_discount ** max(0, staleness or 0)
    shares = {name: value * ranks / data["batch_num_tokens"] for name, value in sums.items()}
    return loss * discount * ranks, Metric.from_dict(shares, aggregation=AggregationType.SUM)


_read_settings = cache(LossSettings.model_validate_json)


def _compute_policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute a loss of ours by its name as verl computes a policy loss, of tensors [B, R].

    The options that its actor has too are verl's; those that it leaves out have our default.
    """
    mask = response_mask.to(log_prob.dtype)
    inputs = LossInputs(
        logprobs=log_prob.float(),
        advantages=advantages,
        loss_mask=mask if rollout_is_weights is None else mask * rollout_is_weights,
        inference_logprobs=old_log_prob,
        denominator=_denominators(response_mask, loss_agg_mode, config.global_batch_info),
    )
    given = {ours: getattr(config, theirs, None) for ours, theirs in _OPTIONS_OF_VERL.items()}
    known = LOSS_OPTIONS[name].model_fields
    options = {ours: value for ours, value in given.items() if ours in known and value is not None}
    loss, sums = resolve_loss(name, **options)(inputs)
    tokens = max(1.0, float(inputs.mask.sum()))
    return loss, {f"actor/{measured}": float(value) / tokens for measured, value in sums.items()}


def _denominators(mask: Tensor, mode: str, info: Mapping[str, Any]) -> Tensor:
    """Return what verl's reduction divides the loss of each token by, over its ranks' average, [B, R]."""
    # `agg_loss` is linear in the tokens' losses, so each token's weight in it is its derivative.
    with torch.enable_grad():
        losses = torch.ones(mask.shape, device=mask.device, requires_grad=True)
        (weights,) = torch.autograd.grad(agg_loss(losses, mask, mode, **info), losses)
    return torch.where(mask.bool(), 1 / weights, 1.0)


for _name in POLICY_LOSSES:
    register_policy_loss(f"atropos_{_name}")(partial(_compute_policy_loss, _name))
