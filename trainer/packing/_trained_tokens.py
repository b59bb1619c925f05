"""The trained tokens of a micro-batch: the one place where a token meets its prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.samples import Sample


def trained_tokens(
    samples: Sequence[Sample], denominators: Sequence[float], *, rows: Tensor, columns: Tensor
) -> dict[str, Any]:
    """Fields of `MicroBatch` that speak of its N trained tokens.

    Token t of a sequence is predicted from its token t - 1.

    Args:
        samples: With S tokens in all.
        denominators: One a sample.
        rows: [S] int64, where each token of each sample in turn stands.
        columns: [S] int64.
    """
    # Column 0 of a sample is never trained, so the token before a trained one is of the same sample.
    where = torch.cat([sample.loss_mask for sample in samples]).nonzero()[:, 0]  # [N] into S
    before = where - 1
    lengths = torch.tensor([len(sample.tokens) for sample in samples])

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)[where]

    def gather(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[where]

    def gather_optional(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return gather(present) if len(present) == len(values) else None

    inference = [sample.inference_logprobs for sample in samples]
    complete = gather_optional(inference)
    if complete is None:
        known = gather([_or_nan(value, sample) for value, sample in zip(inference, samples, strict=True)])
    else:
        known = complete
    return {
        "predict_row": rows[before],
        "predict_column": columns[before],
        "targets": gather([sample.tokens for sample in samples]),
        "loss_mask": gather([sample.loss_mask for sample in samples]),
        "advantages": gather([sample.advantages for sample in samples]),
        "denominator": spread(denominators),
        "temperature": spread([sample.temperature for sample in samples]),
        "inference_logprobs": complete,
        "known_inference_logprobs": known,
        "ref_logprobs": gather_optional([sample.ref_logprobs for sample in samples]),
    }


def _or_nan(values: Tensor | None, sample: Sample) -> Tensor:
    """The values of a sample's tokens, or as many NaN."""
    return torch.full((len(sample.tokens),), math.nan) if values is None else values
