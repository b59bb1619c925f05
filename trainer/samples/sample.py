"""From scored groups to samples: one token sequence each, with everything per token beside it.

What is not to be trained on has been set aside before, see `trainer.samples.validation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas import IGNORE_INDEX, ScoredGroup
from trainer.samples.advantages import tensor_of
from trainer.samples.teacher import TeacherRows

logger = logging.getLogger(__name__)


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
    sequence_index: int = 0
    """Position of the sequence in its group."""
    teacher: TeacherRows | None = None
    """A teacher's candidates for each token. None: not wanted."""

    @property
    def trained_tokens(self) -> float:
        """Sum of the loss mask."""
        return float(self.loss_mask.sum())


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
    loss_mask = (masks != IGNORE_INDEX).float()
    counts = torch.tensor(lengths, dtype=torch.int64)
    loss_mask[counts.cumsum(0) - counts] = 0.0
    return TokenColumns(
        lengths=lengths,
        tokens=tensor_of([flat.tokens for flat in flats], torch.int32).long(),
        loss_mask=loss_mask,
    )


def samples_of_groups(
    groups: Sequence[ScoredGroup],
    columns: TokenColumns,
    advantages: Tensor,
    *,
    default_temperature: Callable[[int | None], float] = lambda env_id: 1.0,
    teacher: Sequence[Sequence[TeacherRows]] | None = None,
) -> list[Sample]:
    """Turn groups into samples; their tensors are views into those given.

    Args:
        groups: Validated groups.
        columns: Their tokens, see `token_columns`.
        advantages: [N] float32, token-aligned, 0 where nothing is trained.
        default_temperature: Temperature of an environment whose groups do not say theirs.
        teacher: A teacher's candidates, of each group, which go into the samples. None: not wanted.
    """
    tokens = torch.split(columns.tokens, columns.lengths)
    loss_masks = torch.split(columns.loss_mask, columns.lengths)
    per_token = torch.split(advantages, columns.lengths)
    samples: list[Sample] = []
    for group_index, group in enumerate(groups):
        flat = group.flat
        inference_logprobs = _rows(flat.inference_logprobs, flat.lengths)
        ref_logprobs = _rows(flat.ref_logprobs, flat.lengths)
        candidates: Sequence[TeacherRows | None] = (
            [None] * len(flat.lengths) if teacher is None else teacher[group_index]
        )
        for index in range(group.sequence_count):
            row = len(samples)
            samples.append(
                Sample(
                    tokens=tokens[row],
                    loss_mask=loss_masks[row],
                    advantages=per_token[row],
                    inference_logprobs=inference_logprobs[index],
                    ref_logprobs=ref_logprobs[index],
                    temperature=sampling_temperature(group, index, default_temperature(group.env_id)),
                    score=group.scores[index],
                    env_id=group.env_id,
                    group_index=group_index,
                    sequence_index=index,
                    teacher=candidates[index],
                )
            )
    return samples


def sampling_temperature(group: ScoredGroup, index: int, default: float = 1.0) -> float:
    """The temperature that sequence `index` was sampled at.

    The sequence's own override wins over the group's generation parameters, those over the group's
    overrides, those over `default`. Zero (greedy) and unusable values count as 1.0: the logits stay as they
    are.
    """
    _, value = named_temperature(group, index)
    if value is None:
        return default
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    return float(value) if usable else 1.0


def named_temperature(group: ScoredGroup, index: int) -> tuple[str, Any]:
    """Find the nearest word on a sequence's temperature: where it stands, and what it says; None: nothing."""
    override = group.overrides[index] if group.overrides is not None else None
    sources = {
        f"overrides[{index}]": override,
        "generation_params": group.generation_params,
        "group_overrides": group.group_overrides,
    }
    for place, source in sources.items():
        if source is not None and source.get("temperature") is not None:
            return place, source["temperature"]
    return "", None


def _rows(values: bytes | None, lengths: list[int]) -> Sequence[Tensor | None]:
    """An optional per-token field as one [T] float32 a sequence."""
    if values is None:
        return [None] * len(lengths)
    return torch.split(tensor_of([values], torch.float32), lengths)
