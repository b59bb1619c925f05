"""From a batch as it came to what one optimizer step computes: samples, advantages, denominators, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas import BatchReply, ScoredGroup
from trainer.config import DataSettings, DistillationSettings, LossSettings
from trainer.samples.advantages import (
    AdvantageNormalizer,
    has_signal,
    is_set_to_zero,
    is_supervised,
    tensor_of,
    token_advantages,
)
from trainer.samples.quarantine_rate import kind_of_reason, name_reasons
from trainer.samples.sample import Sample, samples_of_groups, token_columns
from trainer.samples.teacher import (
    TeacherRows,
    sampled_token_logprobs,
    share_without_sampled_token,
    teacher_reason,
    teacher_rows,
)
from trainer.samples.validation import (
    ModelLimits,
    QuarantinedGroup,
    implausible_reason,
    set_aside_reason,
    split_batch,
)

LARGEST_LOG_RATIO = 20.0
"""The teacher's log-prob and the sampler's are held this near, as the losses hold log-ratios: nothing else
bounds the sampler's, and one token must not decide the step."""


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """Samples of one optimizer step, and the groups that it leaves out."""

    samples: list[Sample]
    """Those with a gradient: any non-zero advantage, or a loss that trains without."""
    denominators: list[float]
    """One a sample: what the loss of each of its tokens is divided by. Samples left out for lack of a
    gradient still count in it, so that leaving them out changes nothing."""
    trained_tokens: float
    """Of all usable groups, the samples left out included."""
    scores: list[float]
    """Of all sequences in usable groups."""
    advantages: list[float]
    """Mean over its trained tokens, one a sequence of all usable groups that has any."""
    set_aside: list[QuarantinedGroup]
    groups: int
    """Usable groups."""
    groups_without_spread: int
    groups_with_binary_masks: int
    """Groups whose masks came as 0/1 and were converted."""
    kl_teacher: float | None
    """Estimate of KL(sampler ‖ teacher) from the sampled tokens, in nats a trained token, with
    `distillation.mode` sampled_token."""
    without_sampled_token: dict[int | None, float]
    """Share of the trained tokens that a teacher's candidates lack, by environment, where the loss is over
    these candidates. Near 1 they are probably those of other positions."""
    normalizer: dict[str, float]
    """State of the advantage normalizer after this batch: what a checkpoint of its step has to hold, while
    the normalizer itself may be batches ahead."""

    @property
    def empty_reason(self) -> str | None:
        """Why there is nothing to compute; None if there is."""
        if self.samples:
            return None
        if not self.scores:
            return self._why_nothing_is_usable
        if not self.trained_tokens:
            return "no token is trained on"
        if len(self.scores) == self.groups:
            return (
                "no advantage differs from 0: every group has one sequence, and there is nothing to compare "
                "it with; data.advantage_estimator raw takes the score itself"
            )
        return "no advantage differs from 0"

    @property
    def _why_nothing_is_usable(self) -> str:
        if not self.set_aside:
            return "it holds no group"
        environments = ", ".join(sorted({str(group.env_id) for group in self.set_aside}))
        kinds = Counter(kind_of_reason(group.reason) for group in self.set_aside)
        return f"all its groups (of environment {environments}) were set aside: {name_reasons(kinds)}"


def prepare_batch(
    reply: BatchReply,
    *,
    limits: ModelLimits,
    data: DataSettings,
    loss: LossSettings,
    normalizer: AdvantageNormalizer,
    distillation: DistillationSettings | None = None,
    keep_all: bool = False,
) -> PreparedBatch:
    """Prepare one optimizer step.

    Every process calls it with the same batch and gets the same answer; they divide the work afterwards.
    With `keep_all` also samples without a gradient stay, for a trainer that counts its denominators itself.
    """
    distillation = distillation or DistillationSettings()
    penalized: list[ScoredGroup] = []
    candidates: list[list[TeacherRows]] = []

    def reason_against(group: ScoredGroup) -> str | None:
        reason = set_aside_reason(
            group,
            limits,
            user_of_inference_logprobs=loss.user_of_inference_logprobs,
            needs_ref_logprobs=loss.needs_ref_logprobs_of_groups,
        ) or _reward_kl_reason(group, data.reward_kl_coefficient)
        if reason is not None:
            return reason
        rows = teacher_rows(group) if distillation.mode != "none" else []
        less_kl = _less_reference_kl(group, data.reward_kl_coefficient)
        reason = teacher_reason(
            group, rows, distillation, vocabulary_size=limits.vocabulary_size
        ) or implausible_reason(
            less_kl,
            estimator=data.bound_estimator,
            uses_temperature=loss.uses_temperature,
            advantage_limit=data.advantage_limit,
        )
        if reason is None:
            penalized.append(less_kl)
            candidates.append(rows)
        return reason

    groups, set_aside = split_batch(reply, reason_against)
    columns = token_columns(groups)
    advantages = token_advantages(penalized, estimator=data.bound_estimator)
    of_groups = torch.split(advantages, [group.token_count for group in groups])
    without_spread = sum(not has_signal(of_group) for of_group in of_groups)
    # A first token may be marked as trained, but nothing predicts it.
    advantages = advantages.masked_fill(columns.loss_mask == 0, 0.0)
    advantages = normalizer(advantages, columns.loss_mask)
    kl_teacher = None
    if distillation.mode == "sampled_token" and groups:
        taught = _teacher_over_sampler(groups, candidates, columns.loss_mask)
        kl_teacher = -float(taught.sum()) / max(1.0, float(columns.loss_mask.sum()))
        advantages = distillation.reward_coefficient * advantages + distillation.coefficient * taught
    if data.advantage_clip is not None:
        advantages = advantages.clamp(*data.advantage_clip)
    samples = samples_of_groups(
        groups,
        columns,
        advantages,
        default_temperature=lambda env_id: data.sampling_temperature_of.get(
            -1 if env_id is None else env_id, data.sampling_temperature
        ),
        teacher=candidates if distillation.is_loss else None,
    )
    trained = columns.per_sequence(columns.loss_mask)
    totals = columns.per_sequence(advantages)
    has_gradient = columns.per_sequence(advantages != 0)
    trained_tokens = sum(trained)
    denominators = _denominators(trained, loss)
    computed = [
        index
        for index, tokens in enumerate(trained)
        if tokens
        and (keep_all or loss.trains_without_advantage or distillation.is_loss or has_gradient[index])
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
        kl_teacher=kl_teacher,
        without_sampled_token=_without_sampled_token(groups, candidates) if distillation.is_loss else {},
        normalizer=normalizer.state_dict(),
    )


def _without_sampled_token(
    groups: Sequence[ScoredGroup], candidates: Sequence[Sequence[TeacherRows]]
) -> dict[int | None, float]:
    """Return the share of the trained tokens that a teacher's candidates lack, by environment."""
    by_environment: dict[int | None, list[tuple[ScoredGroup, Sequence[TeacherRows]]]] = {}
    for group, rows in zip(groups, candidates, strict=True):
        by_environment.setdefault(group.env_id, []).append((group, rows))
    return {env_id: share_without_sampled_token(of_it) for env_id, of_it in by_environment.items()}


def _reward_kl_reason(group: ScoredGroup, coefficient: float) -> str | None:
    """Say why the KL to the reference cannot be taken off a group's scores; None if it can, or is not."""
    for name in ("inference_logprobs", "ref_logprobs"):
        if coefficient > 0 and getattr(group, name) is None:
            return (
                f"no {name}, which data.reward_kl_coefficient needs: let the environment send them, or have "
                "the KL in the loss (loss.kl_coefficient, loss.reference)"
            )
    return None


def _less_reference_kl(group: ScoredGroup, coefficient: float) -> ScoredGroup:
    """Take an estimate of each sequence's KL(sampler ‖ reference) off its score.

    The sum of `μ_t - ρ_t` over its trained tokens (k1), as in RLHF: Ziegler et al. 2019; Ouyang et al. 2022.
    With a coefficient of 0 the group is returned as it is.
    """
    if not coefficient:
        return group
    columns = token_columns([group])
    sampler, reference = (
        tensor_of([values or b""], torch.float32)
        for values in (group.flat.inference_logprobs, group.flat.ref_logprobs)
    )
    sums = columns.per_sequence((sampler - reference).masked_fill(columns.loss_mask == 0, 0.0))
    scores = [score - coefficient * kl for score, kl in zip(group.scores, sums, strict=True)]
    return group.model_copy(update={"scores": scores})


def _teacher_over_sampler(
    groups: Sequence[ScoredGroup], candidates: Sequence[Sequence[TeacherRows]], loss_mask: Tensor
) -> Tensor:
    """Return how much likelier a teacher finds each trained token than its sampler, [N] in nats.

    The negative of it is an estimate of KL(sampler ‖ teacher) from the sampled tokens. A sequence that the
    environment sets to zero, or wants to be fine-tuned on as it is, gets nothing of it.

    Args:
        groups: All have the sampler's log-probs; N tokens in all.
        candidates: The teacher's, of each group.
        loss_mask: [N].
    """
    teacher = torch.cat(
        [sampled_token_logprobs(group, rows) for group, rows in zip(groups, candidates, strict=True)]
    )
    sampler = tensor_of([group.flat.inference_logprobs or b"" for group in groups], torch.float32)
    wanted = torch.tensor(
        [
            not (is_set_to_zero(group, index) or is_supervised(group, index))
            for group in groups
            for index in range(group.sequence_count)
        ]
    )
    lengths = torch.tensor([length for group in groups for length in group.flat.lengths])
    taught = (loss_mask != 0) & wanted.repeat_interleave(lengths)
    difference = (teacher - sampler).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return difference.masked_fill(~taught, 0.0)


def _denominators(trained: Sequence[float], loss: LossSettings) -> list[float]:
    """Denominator of each sample's token losses, given its trained tokens; see `loss.reduction`."""
    if loss.reduction == "token":
        return [sum(trained)] * len(trained)
    if loss.reduction == "token_sum":
        return [1.0] * len(trained)
    sequences = sum(tokens > 0 for tokens in trained)
    if loss.reduction == "sequence":
        return [sequences * tokens for tokens in trained]
    return [float(sequences * loss.constant_length)] * len(trained)
