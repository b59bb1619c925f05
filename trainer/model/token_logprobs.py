"""Runs the model over a micro-batch: log-probs and entropies of the trained tokens, and nothing else.

The head is applied only where a trained token is predicted, once for all branches that share the
prediction. Everything is accumulated in float32, or in float64 where the model itself computes in it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.attention import model_inputs
from trainer.model.lm_head import (
    HeadScores,
    LogitTransform,
    capture_hidden_states,
    selected_logprobs,
    tiled_scores,
)
from trainer.model.sequence_parallel import SequenceGroup
from trainer.model.wrappers import unwrap
from trainer.packing import MicroBatch


@dataclass(frozen=True, kw_only=True)
class TokenLogProbs:
    """Log-probs and entropy of the N trained tokens of a micro-batch."""

    logprobs: Tensor
    """[N] float32, in nats, with gradient."""
    entropy: Tensor
    """[N] float32: entropy of the distribution each token was predicted from, in nats; with gradient where it
    was asked for."""
    candidates: Tensor | None = None
    """[N, K] float32, with gradient: log-probs of the teacher's candidates, 0 where there is none. None: the
    micro-batch has no candidates."""


def token_logprobs(
    model: nn.Module,
    batch: MicroBatch,
    *,
    use_temperature: bool,
    head: LogitTransform | None = None,
    entropy_gradient: bool = False,
    group: SequenceGroup | None = None,
) -> TokenLogProbs:
    """Compute the log-probs of a micro-batch's trained tokens.

    Args:
        model: A causal language model of transformers, wrapped or not.
        batch: On the model's device.
        use_temperature: Divide logits by the temperature each token was sampled at.
        head: What the model does to its head's output, as `choose_head` found it. None: take the model's
            own logits.
        entropy_gradient: Let the entropy be differentiated, too.
        group: The processes that compute this micro-batch together, each some of its columns; all of them
            have to call this.

    Raises:
        ValueError: `head` is given and the model's forward does not call its head as it did when chosen.
    """
    own = batch if group is None else group.own(batch)
    predictions = _predictions(own, use_temperature)
    targets = _Targets.of(own, predictions)
    inputs = model_inputs(unwrap(model), own, group)
    if head is None:
        scores = _from_logits(model, inputs, predictions, targets, entropy_gradient)
    else:
        scores = _from_hidden_states(model, inputs, predictions, targets, head)
    logprobs, candidates = targets.apart(scores.logprobs)
    entropy = scores.entropy if entropy_gradient else scores.entropy.detach()
    entropy = _take(entropy, predictions.entry_rows)
    if group is not None:
        logprobs, entropy = group.everybodys(logprobs, batch), group.everybodys(entropy, batch)
        candidates = group.everybodys(candidates, batch) if candidates is not None else None
    return TokenLogProbs(logprobs=logprobs, entropy=entropy, candidates=candidates)


@dataclass(frozen=True, kw_only=True)
class _Predictions:
    """The U distinct predictions that the N trained tokens are made by."""

    row: Tensor  # [U]
    column: Tensor  # [U]
    temperature: Tensor | None  # [U]; None if all are 1
    entry_rows: Tensor  # [N] into U


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """Tokens to score: the N trained ones, and after them the candidates that there are."""

    rows: Tensor  # [N + M] into U
    token_ids: Tensor  # [N + M]
    known: Tensor | None  # [N, K] bool, M of them true

    @classmethod
    def of(cls, batch: MicroBatch, predictions: _Predictions) -> _Targets:
        rows, candidates = predictions.entry_rows, batch.teacher_token_ids
        if candidates is None:
            return cls(rows=rows, token_ids=batch.targets, known=None)
        known = candidates >= 0
        return cls(
            rows=torch.cat([rows, rows[:, None].expand_as(known)[known]]),
            token_ids=torch.cat([batch.targets, candidates[known]]),
            known=known,
        )

    def apart(self, logprobs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-probs of the trained tokens [N], and of the candidates [N, K]."""
        if self.known is None:
            return logprobs, None
        own, others = logprobs[: len(self.known)], logprobs[len(self.known) :]
        return own, others.new_zeros(self.known.shape).masked_scatter(self.known, others)


def _predictions(batch: MicroBatch, use_temperature: bool) -> _Predictions:
    length = batch.input_ids.shape[1]
    position = batch.predict_row * length + batch.predict_column  # [N] into B * T
    temperature = None
    if use_temperature and bool((batch.temperature != 1).any()):
        values, index = _unique(batch.temperature)
        pairs, entry_rows = _unique(position * len(values) + index)
        position, temperature = pairs // len(values), values[pairs % len(values)]
    else:
        position, entry_rows = _unique(position)
    return _Predictions(
        row=position // length, column=position % length, temperature=temperature, entry_rows=entry_rows
    )


def _unique(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct values, and where each of `values` is among them."""
    distinct, inverse = values.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return distinct, inverse


def _from_hidden_states(
    model: nn.Module,
    inputs: dict[str, Any],
    predictions: _Predictions,
    targets: _Targets,
    head: LogitTransform,
) -> HeadScores:
    """Take the hidden states that predict, and do the head's work ourselves."""
    module: nn.Linear = unwrap(model).get_output_embeddings()
    hidden = capture_hidden_states(model, module, inputs)  # [B, T, H]
    return tiled_scores(
        _take(hidden.flatten(0, 1), predictions.row * hidden.shape[1] + predictions.column),  # [U, H]
        module.weight,
        module.bias,
        targets.rows,
        targets.token_ids,
        temperature=predictions.temperature,
        transform=head,
    )


def _from_logits(
    model: nn.Module,
    inputs: dict[str, Any],
    predictions: _Predictions,
    targets: _Targets,
    entropy_gradient: bool,
) -> HeadScores:
    """Take the model's own logits at every column where any row predicts: [B, K, V]."""
    columns, column = _unique(predictions.column)
    if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters:
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    rows = logits[predictions.row, column]  # [U, V]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if predictions.temperature is not None:
        rows = rows / predictions.temperature[:, None]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = rows.logsumexp(dim=-1) - (rows.softmax(dim=-1) * rows).sum(dim=-1)
    return HeadScores(selected_logprobs(rows, targets.rows, targets.token_ids), entropy)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`, with a backward pass that adds in the same order each time on either device."""
    return values[index] if values.is_cuda else values.index_select(0, index)
