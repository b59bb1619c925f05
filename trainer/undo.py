"""Taking back a batch whose step was given up: all that it changed; the weights it did not.

The advantage normalizer needs no undoing: a checkpoint takes its state as of the last trained batch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BeforeBatch:
    """What a run was before a batch came."""

    batches: int
    """Batches received until then."""
    counters: Mapping[str, int]
    python_random: Any
    numpy_random: Any
    torch_random: Tensor
    cuda_random: Tensor | None

    @classmethod
    def of(cls, batches: int, counters: Mapping[str, int]) -> Self:
        """Take it down; costs well under a millisecond."""
        return cls(
            batches=batches,
            counters=dict(counters),
            python_random=random.getstate(),
            numpy_random=np.random.get_state(),
            torch_random=torch.get_rng_state(),
            cuda_random=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        )

    def restore(self) -> None:
        """Put all random number generators back."""
        random.setstate(self.python_random)
        np.random.set_state(self.numpy_random)
        torch.set_rng_state(self.torch_random)
        if self.cuda_random is not None:
            torch.cuda.set_rng_state(self.cuda_random)
