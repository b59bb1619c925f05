"""Every reason not to train on a group that is valid on the wire.

The wire's own rules (types, lengths, finite numbers) are in `schemas`. Here is what the model cannot take
(token ids outside its vocabulary, sequences beyond its context), what the loss cannot use (no sampler
log-probs), and what would be computed without an error and be wrong: one such value would decide the whole
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from schemas import IGNORE_INDEX, BatchReply, ScoredGroup
from trainer.errors import DataError
from trainer.extensions import BoundEstimator
from trainer.samples.advantages import sequence_advantages, tensor_of
from trainer.samples.sample import named_temperature


@dataclass(frozen=True, kw_only=True)
class QuarantinedGroup:
    """A group that is not trained on, and why."""

    group_index: int
    env_id: int | None
    reason: str
    group: Any
    """The group as a JSON-able object, for inspection."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Limits of a model's inputs."""

    vocabulary_size: int
    max_sequence_length: int


def set_aside_reason(
    group: ScoredGroup,
    limits: ModelLimits,
    *,
    user_of_inference_logprobs: str | None,
    needs_ref_logprobs: bool,
) -> str | None:
    """Say why `group` cannot be trained on by this model and loss; None if it can."""
    flat = group.flat
    longest = max(flat.lengths)
    if longest > limits.max_sequence_length:
        return f"a sequence has {longest} tokens, more than the {limits.max_sequence_length} that are allowed"
    largest = int(tensor_of([flat.tokens], torch.int32).max())
    if largest >= limits.vocabulary_size:
        return f"token id {largest} lies outside the model's vocabulary of {limits.vocabulary_size}"
    if user_of_inference_logprobs is not None and group.inference_logprobs is None:
        return (
            f"no inference_logprobs, which {user_of_inference_logprobs} needs: let the environment send them "
            "(ManagedServer records them), or train with loss.name weighted_sft alone"
        )
    if needs_ref_logprobs and group.ref_logprobs is None:
        return (
            "no ref_logprobs, which the loss needs (for its KL term): let the environment send them, name "
            "a model with loss.reference, or set loss.kl_coefficient 0"
        )
    return None


def split_batch(
    reply: BatchReply, reason_against: Callable[[ScoredGroup], str | None]
) -> tuple[list[ScoredGroup], list[QuarantinedGroup]]:
    """Separate the groups of a batch that can be trained on from those that cannot.

    Args:
        reply: The batch.
        reason_against: Why a valid group is not trained on; None if it is.
    """
    usable: list[ScoredGroup] = []
    set_aside = [
        QuarantinedGroup(group_index=bad.index, env_id=bad.env_id, reason=bad.reason, group=bad.raw)
        for bad in reply.rejected
    ]
    rejected = {bad.index for bad in reply.rejected}
    places = (place for place in range(len(reply.batch or [])) if place not in rejected)
    for index, group in zip(places, reply.groups, strict=True):
        reason = reason_against(group)
        if reason is None:
            usable.append(group)
        else:
            dumped = group.model_dump(mode="json")
            set_aside.append(
                QuarantinedGroup(group_index=index, env_id=group.env_id, reason=reason, group=dumped)
            )
    return usable, set_aside


LOWEST_TEMPERATURE: Final = 0.01
"""vLLM raises any positive temperature below this one to it, because logits divided by less overflow."""

HIGHEST_TEMPERATURE: Final = 100.0
"""Above it every token is about equally likely; no sampler is run like that on purpose."""


def implausible_reason(
    group: ScoredGroup,
    *,
    estimator: BoundEstimator,
    uses_temperature: bool,
    advantage_limit: float | None,
) -> str | None:
    """Say why a valid group should not be trained on; None if it may.

    Args:
        group: A validated group.
        estimator: How scores become advantages where the group has none of its own.
        uses_temperature: Whether the loss divides logits by the sampling temperature.
        advantage_limit: Largest magnitude of an advantage at a trained token, before anything is taken over
            the batch. None: any number.
    """
    return (
        _override_reason(group)
        or (_temperature_reason(group) if uses_temperature else None)
        or _advantage_reason(group, estimator, math.inf if advantage_limit is None else advantage_limit)
    )


def _override_reason(group: ScoredGroup) -> str | None:
    """`set_advantage_to_zero` must be true, false, 1, 0 or null: the text "false" would count as true."""
    for index, override in enumerate(group.overrides or ()):
        value = override.get("set_advantage_to_zero")
        if value is not None and not (isinstance(value, bool | int) and value in (0, 1)):
            return f"overrides[{index}] has set_advantage_to_zero {_quote(value)}; it must be true or false"
    return None


def _temperature_reason(group: ScoredGroup) -> str | None:
    """The nearest word on each sequence's temperature must be one that a sampler can have used."""
    for index in range(group.sequence_count):
        place, value = named_temperature(group, index)
        if value is not None and not _is_temperature(value):
            return (
                f"{place} has temperature {_quote(value)}; it must be 0 (greedy) or a number from "
                f"{LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}"
            )
    return None


def _is_temperature(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE


def _advantage_reason(group: ScoredGroup, estimator: BoundEstimator, limit: float) -> str | None:
    if group.advantages is None:
        try:
            advantages = sequence_advantages(group, estimator=estimator)
        except DataError as error:
            return str(error)
        for index, advantage in enumerate(advantages):
            if not abs(advantage) <= limit:  # NaN, which an estimator of a user's may return
                return _too_large(f"the advantage of sequence {index}", advantage, limit)
        return None
    for index, row in enumerate(group.advantages):
        if max(row) <= limit and min(row) >= -limit:
            continue  # no Python expression for each of half a million tokens
        for column, (advantage, mask) in enumerate(zip(row, group.masks[index], strict=True)):
            if abs(advantage) > limit and mask != IGNORE_INDEX:
                return _too_large(f"advantages[{index}][{column}]", advantage, limit)
    return None


def _too_large(what: str, advantage: float, limit: float) -> str:
    if math.isnan(advantage):
        return f"{what} is not a number"
    return f"{what} is {advantage:g}, beyond {limit:g} (data.advantage_limit): it would decide the whole step"


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
