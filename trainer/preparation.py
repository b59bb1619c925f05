"""From a batch as it came to what one optimizer step computes: samples, advantages, denominators, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from schemas import BatchReply
from trainer.advantages import AdvantageNormalizer, clip_advantages, has_signal, token_advantages
from trainer.config import DataSettings, LossSettings
from trainer.samples import ModelLimits, Sample, SetAside, samples_of_group, split_batch


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
    )
    advantages = [token_advantages(group, estimator=data.advantage_estimator) for group in groups]
    samples = [
        sample
        for index, (group, per_token) in enumerate(zip(groups, advantages, strict=True))
        for sample in samples_of_group(group, per_token, index)
    ]
    samples = _scaled(samples, data, normalizer)
    trained_tokens = sum(sample.trained_tokens for sample in samples)
    denominators = _denominators(samples, trained_tokens, loss)
    computed = [
        (sample, denominator)
        for sample, denominator in zip(samples, denominators, strict=True)
        if sample.trained_tokens and (loss.kl_coefficient > 0 or bool(sample.advantages.any()))
    ]
    return PreparedBatch(
        samples=[sample for sample, _ in computed],
        denominators=[denominator for _, denominator in computed],
        trained_tokens=trained_tokens,
        scores=[sample.score for sample in samples],
        advantages=[_mean_advantage(sample) for sample in samples if sample.trained_tokens],
        set_aside=set_aside,
        groups=len(groups),
        groups_without_spread=sum(not has_signal(per_token) for per_token in advantages),
        groups_with_binary_masks=sum(group.masks_were_binary for group in groups),
    )


def _scaled(samples: Sequence[Sample], data: DataSettings, normalizer: AdvantageNormalizer) -> list[Sample]:
    """Normalize, then clip, the advantages of all samples of the step."""
    advantages = normalizer(
        [sample.advantages for sample in samples], [sample.loss_mask for sample in samples]
    )
    if data.advantage_clip is not None:
        advantages = clip_advantages(advantages, *data.advantage_clip)
    return [replace(sample, advantages=scaled) for sample, scaled in zip(samples, advantages, strict=True)]


def _denominators(samples: Sequence[Sample], trained_tokens: float, loss: LossSettings) -> list[float]:
    """What each sample's token losses are divided by; see `loss.reduction`."""
    if loss.reduction == "token":
        return [trained_tokens] * len(samples)
    sequences = sum(sample.trained_tokens > 0 for sample in samples)
    if loss.reduction == "sequence":
        return [sequences * sample.trained_tokens for sample in samples]
    return [float(sequences * loss.constant_length)] * len(samples)


def _mean_advantage(sample: Sample) -> float:
    return float((sample.advantages * sample.loss_mask).sum()) / sample.trained_tokens
