"""From scored groups to samples: one token sequence each, with everything per token beside it.

Here a group meets the model and the loss: what the model cannot take (token ids outside its vocabulary,
sequences beyond its context) or the loss cannot use (no sampler log-probs) is set aside with a reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas import BatchReply, ScoredGroup
from trainer.advantages import tensor_of
from trainer.errors import MissingLogProbsError

logger = logging.getLogger(__name__)

IGNORED = -100
"""Mask value of a token that is not trained on, in the Atropos protocol."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence of a group. All tensors are token-aligned: column t speaks of token t.

    Example:
        A prompt of three tokens and a completion of two, reward advantage 0.5::

            tokens             [ 12,   7,   9,  31,   2]
            loss_mask          [0.0, 0.0, 0.0, 1.0, 1.0]
            advantages         [0.0, 0.0, 0.0, 0.5, 0.5]
            inference_logprobs [1.0, 1.0, 1.0, -.7, -.1]   (1.0: not sampled)
    """

    tokens: Tensor
    """[T] int64."""
    loss_mask: Tensor
    """[T] float32, 1 where the token is trained on. Column 0 is always 0: nothing predicts it."""
    advantages: Tensor
    """[T] float32, 0 where loss_mask is 0."""
    inference_logprobs: Tensor | None
    """[T] float32: the sampler's log-prob of each token, in nats. None: the environment sent none."""
    ref_logprobs: Tensor | None
    """[T] float32: a reference policy's log-probs, for the KL term. None: not sent."""
    temperature: float
    """Sampling temperature; 1.0 where unknown."""
    score: float
    """The environment's score (reward) of the whole sequence."""
    env_id: int | None
    """Which environment it came from, by the API's number."""
    group_index: int
    """Position of its group in the batch."""

    @property
    def trained_tokens(self) -> float:
        """Sum of the loss mask."""
        return float(self.loss_mask.sum())


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A group that is not trained on, and why."""

    group_index: int
    env_id: int | None
    reason: str
    group: Any
    """The group as a JSON-able object, for inspection."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a model can take."""

    vocabulary_size: int
    max_sequence_length: int


def set_aside_reason(
    group: ScoredGroup, limits: ModelLimits, *, needs_inference_logprobs: bool, needs_ref_logprobs: bool
) -> str | None:
    """Say why `group` cannot be trained on by this model and loss; None if it can."""
    flat = group.flat
    longest = max(flat.lengths)
    if longest > limits.max_sequence_length:
        return f"a sequence has {longest} tokens, more than the {limits.max_sequence_length} that are allowed"
    largest = int(tensor_of([flat.tokens], torch.int32).max())
    if largest >= limits.vocabulary_size:
        return f"token id {largest} lies outside the model's vocabulary of {limits.vocabulary_size}"
    if needs_inference_logprobs and group.inference_logprobs is None:
        return "no inference_logprobs, which the loss needs"
    if needs_ref_logprobs and group.ref_logprobs is None:
        return "no ref_logprobs, which the KL term needs"
    return None


def split_batch(
    reply: BatchReply,
    limits: ModelLimits,
    *,
    needs_inference_logprobs: bool,
    needs_ref_logprobs: bool,
    implausible: Callable[[ScoredGroup], str | None] = lambda group: None,
) -> tuple[list[ScoredGroup], list[SetAside]]:
    """Separate the groups of a batch that can be trained on from those that cannot.

    Args:
        reply: The batch.
        limits: What the model can take.
        needs_inference_logprobs: Whether the loss compares log-probs with the sampler's.
        needs_ref_logprobs: Whether it has a KL term.
        implausible: A further reason against a group; see `trainer.plausibility`.

    Raises:
        MissingLogProbsError: No group of the batch carries the log-probs that the loss needs; that is a
            configuration of the environment, and no later batch will be better.
    """
    usable: list[ScoredGroup] = []
    set_aside = [
        SetAside(group_index=bad.index, env_id=bad.env_id, reason=bad.reason, group=bad.raw)
        for bad in reply.rejected
    ]
    rejected = {bad.index for bad in reply.rejected}
    places = (place for place in range(len(reply.batch or [])) if place not in rejected)
    for index, group in zip(places, reply.groups, strict=True):
        reason = set_aside_reason(
            group,
            limits,
            needs_inference_logprobs=needs_inference_logprobs,
            needs_ref_logprobs=needs_ref_logprobs,
        ) or implausible(group)
        if reason is None:
            usable.append(group)
        else:
            dumped = group.model_dump(mode="json")
            set_aside.append(SetAside(group_index=index, env_id=group.env_id, reason=reason, group=dumped))
    _refuse_if_log_probs_are_missing_everywhere(
        reply.groups, inference=needs_inference_logprobs, reference=needs_ref_logprobs
    )
    return usable, set_aside


def _refuse_if_log_probs_are_missing_everywhere(
    groups: Sequence[ScoredGroup], *, inference: bool, reference: bool
) -> None:
    environments = sorted({str(group.env_id) for group in groups})
    if inference and groups and all(group.inference_logprobs is None for group in groups):
        raise MissingLogProbsError(
            f"no group of the batch (from environment {', '.join(environments)}) carries inference_logprobs, "
            "and the loss compares them with the trainer's. Let the environment sample through "
            "ManagedServer (server_type vllm or sglang) and send node.logprobs as inference_logprobs, "
            "or train with --loss.name weighted_sft."
        )
    if reference and groups and all(group.ref_logprobs is None for group in groups):
        raise MissingLogProbsError(
            f"no group of the batch (from environment {', '.join(environments)}) carries ref_logprobs, and "
            "loss.kl_coefficient is above 0. Let the environment send them, or set it to 0."
        )


@dataclass(frozen=True, kw_only=True)
class TokenColumns:
    """The tokens of several groups, N in all, their sequences one after another."""

    lengths: list[int]
    """T of each sequence."""
    tokens: Tensor
    """[N] int64."""
    loss_mask: Tensor
    """[N] float32, 1 where the token is trained on; 0 in the first column of each sequence."""

    def per_sequence(self, values: Tensor) -> list[float]:
        """Add up [N] `values` over each sequence, in float64."""
        if not self.lengths:
            return []
        first = np.cumsum([0, *self.lengths[:-1]])  # no sequence is empty
        sums: list[float] = np.add.reduceat(values.numpy(), first, dtype=np.float64).tolist()
        return sums


def token_columns(groups: Sequence[ScoredGroup]) -> TokenColumns:
    """Lay the tokens of `groups` one after another."""
    flats = [group.flat for group in groups]
    lengths = [length for flat in flats for length in flat.lengths]
    masks = tensor_of([flat.masks for flat in flats], torch.int32)
    loss_mask = (masks != IGNORED).float()
    counts = torch.tensor(lengths, dtype=torch.int64)
    loss_mask[counts.cumsum(0) - counts] = 0.0
    return TokenColumns(
        lengths=lengths,
        tokens=tensor_of([flat.tokens for flat in flats], torch.int32).long(),
        loss_mask=loss_mask,
    )


def samples_of_groups(
    groups: Sequence[ScoredGroup], columns: TokenColumns, advantages: Tensor
) -> list[Sample]:
    """Turn groups into samples; their tensors are views into those given.

    Args:
        groups: Validated groups.
        columns: Their tokens, see `token_columns`.
        advantages: [N] float32, token-aligned, 0 where nothing is trained.
    """
    tokens = torch.split(columns.tokens, columns.lengths)
    loss_masks = torch.split(columns.loss_mask, columns.lengths)
    per_token = torch.split(advantages, columns.lengths)
    samples: list[Sample] = []
    for group_index, group in enumerate(groups):
        flat = group.flat
        inference_logprobs = _rows(flat.inference_logprobs, flat.lengths)
        ref_logprobs = _rows(flat.ref_logprobs, flat.lengths)
        for index in range(group.sequence_count):
            row = len(samples)
            samples.append(
                Sample(
                    tokens=tokens[row],
                    loss_mask=loss_masks[row],
                    advantages=per_token[row],
                    inference_logprobs=inference_logprobs[index],
                    ref_logprobs=ref_logprobs[index],
                    temperature=sampling_temperature(group, index),
                    score=group.scores[index],
                    env_id=group.env_id,
                    group_index=group_index,
                )
            )
    return samples


def sampling_temperature(group: ScoredGroup, index: int) -> float:
    """The temperature that sequence `index` was sampled at.

    The sequence's own override wins over the group's generation parameters, those over the group's
    overrides. Unknown, zero (greedy) and unusable values count as 1.0: the logits stay as they are.
    """
    override = group.overrides[index] if group.overrides is not None else None
    for source in (override, group.generation_params, group.group_overrides):
        value = source.get("temperature") if isinstance(source, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            return float(value)
    return 1.0


def _rows(values: bytes | None, lengths: list[int]) -> Sequence[Tensor | None]:
    """An optional per-token field as one [T] float32 a sequence."""
    if values is None:
        return [None] * len(lengths)
    return torch.split(tensor_of([values], torch.float32), lengths)
