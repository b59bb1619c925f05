"""Running the model over a micro-batch: log-probs of the trained tokens, and nothing else.

The head is applied only where a trained token is predicted. Everything is accumulated in float32, or in
float64 where the model itself computes in it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.attention import model_inputs
from trainer.model_directory import unwrap
from trainer.packing import MicroBatch


@dataclass(frozen=True, kw_only=True)
class TokenLogProbs:
    """What the policy says of the N trained tokens of a micro-batch."""

    logprobs: Tensor
    """[N] float32, in nats, with gradient."""
    entropy: Tensor
    """[N] float32: entropy of the distribution each token was predicted from, in nats; no gradient."""


def token_logprobs(model: nn.Module, batch: MicroBatch, *, use_temperature: bool) -> TokenLogProbs:
    """Compute the log-probs of a micro-batch's trained tokens.

    Args:
        model: A causal language model of transformers, wrapped or not.
        batch: On the model's device.
        use_temperature: Divide logits by the temperature each token was sampled at.
    """
    columns, column_index = _unique(batch.predict_column)  # [K], [N]
    logits = _logits_at(model, batch, columns)  # [B, K, V]
    positions = batch.predict_row * len(columns) + column_index  # [N] into B * K
    unique, inverse = _unique(positions)  # [U], [N]
    rows = logits.flatten(0, 1)[unique]  # [U, V]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    temperature = batch.temperature if use_temperature else torch.ones_like(batch.temperature)
    temperature = temperature.to(rows.dtype)
    values, _ = _unique(temperature)
    if len(values) == 1:
        return _score(rows / values if values != 1 else rows, inverse, batch.targets)
    logprobs = torch.zeros_like(temperature)
    entropy = torch.zeros_like(temperature)
    for value in values:
        chosen = temperature == value
        scores = _score(rows / value, inverse[chosen], batch.targets[chosen])
        logprobs = logprobs.masked_scatter(chosen, scores.logprobs)
        entropy = entropy.masked_scatter(chosen, scores.entropy)
    return TokenLogProbs(logprobs=logprobs, entropy=entropy)


def _unique(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct values, and where each of `values` is among them."""
    distinct, inverse = values.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return distinct, inverse


def _score(rows: Tensor, inverse: Tensor, targets: Tensor) -> TokenLogProbs:
    """Score targets [N] predicted from rows[inverse]; rows are logits [U, V]."""
    log_normalizer = rows.logsumexp(dim=-1)  # [U]
    logprobs = rows[inverse, targets] - log_normalizer[inverse]  # [N]
    with torch.no_grad():
        expected = (rows.softmax(dim=-1) * rows).sum(dim=-1)  # [U]
        entropy = (log_normalizer - expected)[inverse]
    return TokenLogProbs(logprobs=logprobs, entropy=entropy)


def _logits_at(model: nn.Module, batch: MicroBatch, columns: Tensor) -> Tensor:
    """Logits [B, K, V] at the K given columns of every row."""
    inner = unwrap(model)
    inputs = model_inputs(inner, batch)
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
        return logits
    everywhere: Tensor = model(**inputs).logits
    return everywhere[:, columns]
