"""From samples to micro-batches: which tokens are computed together, and in which order.

`prefix_tree` folds sequences that start alike into a tree, so that a prompt shared by a group is computed
once and nothing is padded; each token attends to exactly its own ancestors. `padded` gives each sequence
a row of its own, for models whose attention cannot take the tree. Both yield the same `MicroBatch`, and
the same gradients as training each sequence alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.samples import Sample


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward and backward pass.

    B rows of T columns; N trained tokens in all. Entry n says: the prediction made at
    (`predict_row[n]`, `predict_column[n]`) is of token `targets[n]`. Several entries may share a
    prediction: the token after a branch point is supervised for every branch.
    """

    input_ids: Tensor
    """[B, T] int64."""
    position_ids: Tensor
    """[B, T] int64: depth of each token in its own sequence."""
    attention_mask: Tensor
    """[B, 1, T, T] bool, True where row-token may attend to column-token (prefix_tree), or [B, T] int64,
    1 for tokens and 0 for padding (padded)."""
    predict_row: Tensor
    """[N] int64."""
    predict_column: Tensor
    """[N] int64."""
    targets: Tensor
    """[N] int64."""
    loss_mask: Tensor
    """[N] float32."""
    advantages: Tensor
    """[N] float32."""
    denominator: Tensor
    """[N] float32: what each token's loss is divided by, so that the step's micro-batches add up."""
    temperature: Tensor
    """[N] float32."""
    inference_logprobs: Tensor | None
    """[N] float32; None if any sample lacks them: a loss needs them all, or none."""
    known_inference_logprobs: Tensor
    """[N] float32, NaN where the environment sent none: for metrics."""
    ref_logprobs: Tensor | None
    """[N] float32."""
    sequence_tokens: int
    """Tokens of its sequences, before folding and without padding."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def without_weight(self) -> MicroBatch:
        """Return a copy that contributes nothing: for processes that have fewer micro-batches."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))


Packing = Literal["prefix_tree", "padded"]


def pack(
    samples: Sequence[Sample],
    denominators: Sequence[float],
    *,
    packing: Packing,
    tokens_per_micro_batch: int,
) -> list[MicroBatch]:
    """Group samples into micro-batches of at most `tokens_per_micro_batch` computed tokens.

    A single sequence longer than that gets a micro-batch of its own. The order is fixed by the samples'
    tokens, so equal steps are packed equally.

    Args:
        samples: At least one.
        denominators: One a sample: what the loss of each of its tokens is divided by.
        packing: See the module.
        tokens_per_micro_batch: Token budget, > 0.
    """
    weighted = list(zip(samples, denominators, strict=True))
    if packing == "prefix_tree":
        weighted.sort(key=lambda item: item[0].tokens.tolist())
        return [_fold(part) for part in _split_by_new_tokens(weighted, tokens_per_micro_batch)]
    weighted.sort(key=lambda item: len(item[0].tokens), reverse=True)
    return [_pad(part) for part in _split_by_rectangle(weighted, tokens_per_micro_batch)]


Weighted = tuple[Sample, float]


def shared_prefix_length(first: Tensor, second: Tensor) -> int:
    """Number of tokens that two sequences have in common at their start."""
    shorter = min(len(first), len(second))
    differs = (first[:shorter] != second[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter


def _split_by_new_tokens(weighted: Iterable[Weighted], budget: int) -> Iterator[list[Weighted]]:
    """Cut sorted samples where the tokens that the tree would gain pass the budget."""
    part: list[Weighted] = []
    used = 0
    for item in weighted:
        tokens = item[0].tokens
        new = len(tokens) - (shared_prefix_length(part[-1][0].tokens, tokens) if part else 0)
        if part and used + new > budget:
            yield part
            part, used, new = [], 0, len(tokens)
        part.append(item)
        used += new
    if part:
        yield part


def _split_by_rectangle(weighted: Iterable[Weighted], budget: int) -> Iterator[list[Weighted]]:
    """Cut samples, longest first, where rows times the longest row pass the budget."""
    part: list[Weighted] = []
    for item in weighted:
        if part and (len(part) + 1) * len(part[0][0].tokens) > budget:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _fold(weighted: list[Weighted]) -> MicroBatch:
    """Fold sorted samples into one row: each adds only the tokens it does not share with the one before.

    In lexicographic order no earlier sequence shares more with a sequence than its neighbour does, so
    looking at the neighbour alone finds the whole tree.
    """
    paths = _tree_paths([sample.tokens for sample, _ in weighted])
    total = 1 + max(int(path.max()) for path in paths)
    input_ids = torch.zeros(total, dtype=torch.int64)
    position_ids = torch.zeros(total, dtype=torch.int64)
    allowed = torch.zeros(total, total, dtype=torch.bool)
    start = 0  # first column that the current sequence adds
    for (sample, _), path in zip(weighted, paths, strict=True):
        own = path[path >= start]
        input_ids[path] = sample.tokens
        position_ids[path] = torch.arange(len(path))
        if len(own):
            shared, end = path[: len(path) - len(own)], int(own[-1]) + 1
            allowed[start:end, shared] = True
            allowed[start:end, start:end] = torch.ones(len(own), len(own), dtype=torch.bool).tril()
            start = end
    return _with_trained_tokens(
        weighted,
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=allowed[None, None],
        rows=[torch.zeros_like(path) for path in paths],
        columns=paths,
    )


def _tree_paths(sequences: Sequence[Tensor]) -> list[Tensor]:
    """For each sorted sequence, the column of each of its tokens in the folded row: a list of [T]."""
    paths = [torch.arange(len(sequences[0]))]
    used = len(sequences[0])
    for previous, tokens in pairwise(sequences):
        shared = shared_prefix_length(previous, tokens)
        new = len(tokens) - shared
        paths.append(torch.cat([paths[-1][:shared], torch.arange(used, used + new)]))
        used += new
    return paths


def _pad(weighted: list[Weighted]) -> MicroBatch:
    lengths = [len(sample.tokens) for sample, _ in weighted]
    shape = (len(weighted), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (sample, _) in enumerate(weighted):
        input_ids[row, : lengths[row]] = sample.tokens
        attention_mask[row, : lengths[row]] = 1
    return _with_trained_tokens(
        weighted,
        input_ids=input_ids,
        position_ids=torch.arange(shape[1]).expand(shape).clone(),
        attention_mask=attention_mask,
        rows=[torch.full((length,), row) for row, length in enumerate(lengths)],
        columns=[torch.arange(length) for length in lengths],
    )


def _with_trained_tokens(
    weighted: list[Weighted],
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    rows: list[Tensor],
    columns: list[Tensor],
) -> MicroBatch:
    """Collect the trained tokens of all samples; the one place where a token meets its prediction.

    Token t of a sequence is predicted from its token t - 1.
    """
    samples = [sample for sample, _ in weighted]
    trained = [sample.loss_mask.nonzero()[:, 0] for sample in samples]  # each [n], all >= 1

    def gather(values: Sequence[Tensor], shift: int = 0) -> Tensor:
        return torch.cat([value[where - shift] for value, where in zip(values, trained, strict=True)])

    def spread(values: Iterable[float]) -> Tensor:
        return torch.cat(
            [torch.full((len(where),), value) for value, where in zip(values, trained, strict=True)]
        )

    def gather_optional(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return gather(present) if len(present) == len(values) else None

    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        predict_row=gather(rows, shift=1),
        predict_column=gather(columns, shift=1),
        targets=gather([sample.tokens for sample in samples]),
        loss_mask=gather([sample.loss_mask for sample in samples]),
        advantages=gather([sample.advantages for sample in samples]),
        denominator=spread(denominator for _, denominator in weighted),
        temperature=spread(sample.temperature for sample in samples),
        inference_logprobs=gather_optional([sample.inference_logprobs for sample in samples]),
        known_inference_logprobs=gather([_or_nan(sample.inference_logprobs, sample) for sample in samples]),
        ref_logprobs=gather_optional([sample.ref_logprobs for sample in samples]),
        sequence_tokens=sum(len(sample.tokens) for sample in samples),
    )


def _or_nan(values: Tensor | None, sample: Sample) -> Tensor:
    """The values of a sample's tokens, or as many NaN."""
    return torch.full((len(sample.tokens),), math.nan) if values is None else values
