"""Our losses where verl looks for losses: as policy losses by name, and as the loss of an engine.

================  =====================================  ==================================================
                  policy loss `atropos_<name>`           `EngineLoss`
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
from typing import Any, Final

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
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


class EngineLoss:
    """A loss of ours as the engines of verl call it: `loss(model_output=..., data=..., dp_group=...)`.

    Args:
        settings: Section `loss`.
    """

    def __init__(self, settings: LossSettings) -> None:
        self._settings = settings

    def __reduce__(self) -> tuple[Callable[[str], EngineLoss], tuple[str]]:
        """Travel to the workers as settings: a loss itself is found by its name there."""
        return _engine_loss, (self._settings.model_dump_json(),)

    def __call__(
        self, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a micro-batch and its metrics.

        Args:
            model_output: Of the engine; `log_probs` is jagged, its entry t speaks of token t + 1.
            data: Rows as `verl_integration.batches` makes them.
            dp_group: Not needed: the denominators are those of the whole step.
        """
        del dp_group
        facts: StepFacts = data["atropos"]
        logprobs = no_padding_2_padding(model_output["log_probs"], data).float()  # [B, R], of each token
        fields = ["response_mask", "advantages", "old_log_probs"]
        fields += ["ref_log_prob"] if "ref_log_prob" in data.keys() else []  # noqa: SIM118 - a TensorDict
        rows = data.select(*fields).to_padded_tensor()
        inputs = LossInputs(
            logprobs=logprobs,
            advantages=rows["advantages"],
            loss_mask=rows["response_mask"],
            inference_logprobs=rows["old_log_probs"] if facts.has_sampler else None,
            ref_logprobs=rows.get("ref_log_prob", None),
            denominator=data["denominators"][:, None],
            staleness=facts.staleness,
            statistics=facts.statistics,
        )
        loss, sums = self._settings.bound(inputs)
        loss = loss * self._settings.staleness_discount ** max(0, facts.staleness or 0)
        ranks = int(data["dp_size"])
        # Verl averages metrics over ranks, and adds up micro-batches.
        metrics = {
            name: Metric(AggregationType.SUM, value * ranks / facts.tokens) for name, value in sums.items()
        }
        return loss * ranks, metrics


def _engine_loss(settings: str) -> EngineLoss:
    return EngineLoss(LossSettings.model_validate_json(settings))


def register_policy_losses() -> None:
    """Register every loss of `POLICY_LOSSES` under `atropos_<name>`."""
    for name in POLICY_LOSSES:
        register_policy_loss(POLICY_LOSS_PREFIX + name)(_policy_loss(name))


def _policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        info: Mapping[str, Any] = getattr(config, "global_batch_info", None) or {}
        mask = response_mask.to(log_prob.dtype)
        inputs = LossInputs(
            logprobs=log_prob.float(),
            advantages=advantages,
            loss_mask=mask if rollout_is_weights is None else mask * rollout_is_weights,
            inference_logprobs=old_log_prob,
            denominator=_denominator(response_mask, loss_agg_mode, info),
        )
        loss, sums = resolve_loss(name, **_options(name, config))(inputs)
        tokens = max(1.0, float(inputs.mask.sum()))
        metrics = {f"actor/{measured}": float(value) / tokens for measured, value in sums.items()}
        return loss * (info.get("dp_size") or 1), metrics

    compute.__doc__ = f"`{name}` of trainer.losses, as a policy loss of verl."
    return compute


def _options(name: str, config: Any) -> dict[str, float]:
    """Options of a loss that verl's actor has too; those that it leaves out have our default."""
    known = {ours for ours in _OPTIONS_OF_VERL if ours in LOSS_OPTIONS[name].model_fields}
    given = {ours: getattr(config, _OPTIONS_OF_VERL[ours], None) for ours in known}
    return {ours: value for ours, value in given.items() if value is not None}


def _denominator(mask: Tensor, mode: str, info: Mapping[str, Any]) -> Tensor | float:
    """What verl divides the sum of all tokens' losses by, as `agg_loss` does.

    Args:
        mask: [B, R].
        mode: Its `loss_agg_mode`.
        info: Its `global_batch_info`; what is missing is counted here.

    Raises:
        ValueError: There is no such mode.
    """
    of_rows = mask.sum(dim=-1, keepdim=True)  # [B, 1]
    sequences = info.get("global_batch_size") or max(1, int((of_rows > 0).sum()))
    if mode == "token-mean":
        return float(info.get("batch_num_tokens") or max(1, int(mask.sum())))
    if mode == "token-sum":
        return 1.0
    if mode == "seq-mean-token-mean":
        return sequences * torch.clamp(of_rows, min=1)
    if mode == "seq-mean-token-sum":
        return float(sequences)
    if mode == "seq-mean-token-sum-norm":
        return float(sequences * (info.get("loss_scale_factor") or mask.shape[-1]))
    raise ValueError(f"loss_agg_mode {mode!r} is not one that losses of atropos-trainer know")
