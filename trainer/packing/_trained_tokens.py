"""The trained tokens of a step: the one place where a token meets its prediction.

They are gathered once a step, sample after sample, so that those of a micro-batch are a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.packing._arrays import Array, Integers, as_array
from trainer.samples.sample import Sample
from trainer.samples.teacher import NO_TOKEN


@dataclass(frozen=True, kw_only=True)
class TrainedTokens:
    """N trained tokens of n samples, in the order of the samples."""

    first: Integers
    """[n + 1]: those of sample i are `first[i] .. first[i + 1] - 1`."""
    position: Integers
    """[N] place of each in its own sample, at least 1; it is predicted from the place before."""
    fields: dict[str, Array]
    """[N] each: what `MicroBatch` says of them, NaN where it was not sent."""
    sent: dict[str, Array]
    """[n] bool each: of the fields that may be missing, which samples have them."""
    origins: Integers
    """[n, 2]: the group of each sample, and its place there."""

    @classmethod
    def of(
        cls, samples: Sequence[Sample], tokens: Sequence[Integers], denominators: Sequence[float]
    ) -> TrainedTokens:
        """Gather those of `samples`, whose `tokens` are given as arrays."""
        lengths = np.array([len(array) for array in tokens], dtype=np.int64)
        offsets = np.concatenate(([0], lengths.cumsum()))
        loss_mask = np.concatenate([as_array(sample.loss_mask) for sample in samples])
        where = loss_mask.nonzero()[0]
        first = np.searchsorted(where, offsets)
        counts = np.diff(first)

        def gather(values: Sequence[Array]) -> Array:
            result: Array = np.concatenate(values)[where]
            return result

        def spread(values: Sequence[float]) -> Array:
            return np.repeat(np.array(values, dtype=np.float32), counts)

        optional = {
            "inference_logprobs": [sample.inference_logprobs for sample in samples],
            "ref_logprobs": [sample.ref_logprobs for sample in samples],
        }
        sent = {name: np.array([value is not None for value in values]) for name, values in optional.items()}
        fields = {
            "targets": gather(tokens),
            "loss_mask": loss_mask[where],
            "advantages": gather([as_array(sample.advantages) for sample in samples]),
            "denominator": spread(denominators),
            "temperature": spread([sample.temperature for sample in samples]),
        }
        for name, values in optional.items():
            if sent[name].any():
                pairs = zip(values, lengths.tolist(), strict=True)
                fields[name] = gather([_or_nan(value, length) for value, length in pairs])
            else:
                fields[name] = np.full(len(where), np.nan, dtype=np.float32)
        if all(sample.teacher is not None for sample in samples):
            fields |= _teacher_fields(samples, where, offsets, first)
        origins = np.array([(sample.group_index, sample.sequence_index) for sample in samples], np.int64)
        return cls(
            first=first,
            position=where - np.repeat(offsets[:-1], counts),
            fields=fields,
            sent=sent,
            origins=origins.reshape(-1, 2),
        )

    def position_of(self, sample: int) -> Integers:
        """Places of a sample's trained tokens."""
        return self.position[self.first[sample] : self.first[sample + 1]]

    def of_micro_batch(self, chosen: Integers, *, rows: Integers, columns: Integers) -> dict[str, Any]:
        """Fields of `MicroBatch` that speak of its trained tokens.

        Args:
            chosen: Its samples, in any order.
            rows: Where the predictions of their trained tokens are made, sample after sample.
            columns: The same.
        """
        where = self._where(chosen)
        fields = {name: torch.from_numpy(values[where]) for name, values in self.fields.items()}
        known = fields["inference_logprobs"]
        complete: dict[str, Tensor | None] = {
            name: fields[name] if self.sent[name][chosen].all() else None for name in self.sent
        }
        counts = self.first[chosen + 1] - self.first[chosen]
        return {
            **fields,
            **complete,
            "sequence_ids": torch.from_numpy(np.repeat(np.arange(len(chosen)), counts)),
            "origins": torch.from_numpy(self.origins[chosen]),
            "sequence_count": len(chosen),
            "known_inference_logprobs": known,
            "predict_row": torch.from_numpy(rows),
            "predict_column": torch.from_numpy(columns),
        }

    def _where(self, chosen: Integers) -> Integers | slice:
        if (np.diff(chosen) == 1).all():  # neighbours, as those of a group are
            return slice(int(self.first[chosen[0]]), int(self.first[chosen[-1] + 1]))
        return np.concatenate([np.arange(self.first[one], self.first[one + 1]) for one in chosen.tolist()])


def _teacher_fields(
    samples: Sequence[Sample], where: Integers, offsets: Integers, first: Integers
) -> dict[str, Array]:
    """[N, K] candidates of the trained tokens, K the most that any sample has."""
    rows = [sample.teacher for sample in samples if sample.teacher is not None]
    candidates = max(row.token_ids.shape[1] for row in rows)
    token_ids = np.full((len(where), candidates), NO_TOKEN, dtype=np.int64)
    logprobs = np.full((len(where), candidates), -np.inf, dtype=np.float32)
    for row, offset, (start, end) in zip(rows, offsets[:-1], pairwise(first.tolist()), strict=True):
        places, width = where[start:end] - offset, row.token_ids.shape[1]
        token_ids[start:end, :width] = as_array(row.token_ids)[places]
        logprobs[start:end, :width] = as_array(row.logprobs)[places]
    return {"teacher_token_ids": token_ids, "teacher_logprobs": logprobs}


def _or_nan(values: Tensor | None, length: int) -> Array:
    """The values of a sample's tokens, or as many NaN."""
    return np.full(length, np.nan, dtype=np.float32) if values is None else as_array(values)
