"""The trained tokens of a micro-batch: the one place where a token meets its prediction.

In NumPy, on one thread: this runs beside the training of the step before, whose threads it would wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.packing._sorting import Array, Integers, as_array
from trainer.samples import Sample


def trained_tokens(
    samples: Sequence[Sample], denominators: Sequence[float], *, rows: Integers, columns: Integers
) -> dict[str, Any]:
    """Fields of `MicroBatch` that speak of its N trained tokens.

    Token t of a sequence is predicted from its token t - 1.

    Args:
        samples: With S tokens in all.
        denominators: One a sample.
        rows: [S], where each token of each sample in turn stands.
        columns: [S].
    """
    # Column 0 of a sample is never trained, so the token before a trained one is of the same sample.
    where = np.concatenate([as_array(sample.loss_mask) for sample in samples]).nonzero()[0]  # [N] into S
    lengths = np.array([len(sample.tokens) for sample in samples])

    def spread(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)[where])

    def gather(values: Sequence[Tensor | Array]) -> Tensor:
        arrays = [as_array(value) if isinstance(value, Tensor) else value for value in values]
        return torch.from_numpy(np.concatenate(arrays)[where])

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
        "predict_row": torch.from_numpy(rows[where - 1]),
        "predict_column": torch.from_numpy(columns[where - 1]),
        "targets": gather([sample.tokens for sample in samples]),
        "loss_mask": gather([sample.loss_mask for sample in samples]),
        "advantages": gather([sample.advantages for sample in samples]),
        "denominator": spread(denominators),
        "temperature": spread([sample.temperature for sample in samples]),
        "inference_logprobs": complete,
        "known_inference_logprobs": known,
        "ref_logprobs": gather_optional([sample.ref_logprobs for sample in samples]),
    }


def _or_nan(values: Tensor | None, sample: Sample) -> Tensor | Array:
    """The values of a sample's tokens, or as many NaN."""
    return np.full(len(sample.tokens), np.nan, dtype=np.float32) if values is None else values
