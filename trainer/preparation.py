"""From a batch as it came to what one optimizer step computes: samples, advantages, denominators, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas import BatchReply
from trainer.advantages import AdvantageNormalizer, clip_advantages, has_signal, token_advantages
from trainer.config import DataSettings, LossSettings
from trainer.packing import MicroBatch
from trainer.plausibility import implausible_reason
from trainer.samples import (
    ModelLimits,
    Sample,
    SetAside,
    samples_of_groups,
    split_batch,
    token_columns,
)


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """What one optimizer step computes, and what it leaves out."""

    samples: list[Sample]
    """Those with a gradient: any non-zero advantage, or a KL term."""
    denominators: list[float]
    """One a sample: what the loss of each of its tokens is divided by. Samples left out for lack of a
    gradient still count in it, so that leaving them out changes nothing."""
    trained_tokens: float
    """Of all usable groups, the samples left out included."""
    scores: list[float]
    """Of all sequences in usable groups."""
    advantages: list[float]
    """Mean over its trained tokens, one a sequence of all usable groups that has any."""
    set_aside: list[SetAside]
    groups: int
    """Usable groups."""
    groups_without_spread: int
    groups_with_binary_masks: int
    """Groups whose masks came as 0/1 and were converted."""
    normalizer: dict[str, float]
    """State of the advantage normalizer after this batch: what a checkpoint of its step has to hold, while
    the normalizer itself may be batches ahead."""

    @property
    def why_empty(self) -> str | None:
        """Why there is nothing to compute; None if there is."""
        if self.samples:
            return None
        if not self.scores:
            return "no group has a usable sequence"
        return "no advantage differs from 0" if self.trained_tokens else "no token is trained on"


@dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A batch from which a step can be computed at once."""

    batch: PreparedBatch
    micro_batches: list[MicroBatch]
    """Empty if no sample of the batch has a gradient."""
    seconds: float
    """How long preparing and packing took, parsing not counted."""


def prepare_batch(
    reply: BatchReply,
    *,
    limits: ModelLimits,
    data: DataSettings,
    loss: LossSettings,
    normalizer: AdvantageNormalizer,
) -> PreparedBatch:
    """Prepare one optimizer step.

    Every process calls it with the same batch and gets the same answer; they divide the work afterwards.

    Raises:
        MissingLogProbsError: No group of the batch carries the log-probs that the loss needs.
    """
    groups, set_aside = split_batch(
        reply,
        limits,
        needs_inference_logprobs=loss.needs_inference_logprobs,
        needs_ref_logprobs=loss.kl_coefficient > 0,
        implausible=lambda group: implausible_reason(
            group,
            estimator=data.advantage_estimator,
            uses_temperature=loss.uses_temperature,
            advantage_limit=data.advantage_limit,
        ),
    )
    columns = token_columns(groups)
    advantages = token_advantages(groups, estimator=data.advantage_estimator)
    of_groups = torch.split(advantages, [group.token_count for group in groups])
    without_spread = sum(not has_signal(of_group) for of_group in of_groups)
    # A first token may be marked as trained, but nothing predicts it.
    advantages = advantages.masked_fill(columns.loss_mask == 0, 0.0)
    advantages = _scaled(advantages, columns.loss_mask, data, normalizer)
    samples = samples_of_groups(groups, columns, advantages)
    trained = columns.per_sequence(columns.loss_mask)
    totals = columns.per_sequence(advantages)
    has_gradient = columns.per_sequence(advantages != 0)
    trained_tokens = sum(trained)
    denominators = _denominators(trained, loss)
    computed = [
        index
        for index, tokens in enumerate(trained)
        if tokens and (loss.kl_coefficient > 0 or has_gradient[index])
    ]
    return PreparedBatch(
        samples=[samples[index] for index in computed],
        denominators=[denominators[index] for index in computed],
        trained_tokens=trained_tokens,
        scores=[sample.score for sample in samples],
        advantages=[total / tokens for total, tokens in zip(totals, trained, strict=True) if tokens],
        set_aside=set_aside,
        groups=len(groups),
        groups_without_spread=without_spread,
        groups_with_binary_masks=sum(group.masks_were_binary for group in groups),
        normalizer=normalizer.state_dict(),
    )


def _scaled(
    advantages: Tensor, loss_mask: Tensor, data: DataSettings, normalizer: AdvantageNormalizer
) -> Tensor:
    """Normalize, then clip, all advantages of the step."""
    (advantages,) = normalizer([advantages], [loss_mask])
    if data.advantage_clip is not None:
        (advantages,) = clip_advantages([advantages], *data.advantage_clip)
    return advantages


def _denominators(trained: Sequence[float], loss: LossSettings) -> list[float]:
    """What each sample's token losses are divided by, given its trained tokens; see `loss.reduction`."""
    if loss.reduction == "token":
        return [sum(trained)] * len(trained)
    sequences = sum(tokens > 0 for tokens in trained)
    if loss.reduction == "sequence":
        return [sequences * tokens for tokens in trained]
    return [float(sequences * loss.constant_length)] * len(trained)
