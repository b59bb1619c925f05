"""Scales the advantages of a whole optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.errors import CheckpointError

NormalizationMode = Literal["none", "batch", "global"]
"""The values of ``data.advantage_normalization``."""

_NO_SPREAD = 1e-6
"""A standard deviation below this share of the root mean square is rounding: advantages stay undivided."""


class AdvantageNormalizer:
    """Divides a step's advantages by their standard deviation over trained tokens; never shifts them.

    Not shifting keeps what a zero means: a group without spread, or a sequence that its environment set to
    zero, is neither rewarded nor punished for how the rest of the step went.

    ``batch`` takes the standard deviation of this step. ``global`` takes that of every step so far, this one
    included, accumulated by Welford's method in its parallel form (Chan et al. 1983): steadier, for small
    steps. ``none`` returns the advantages as they came.

    Args:
        mode: ``none``, ``batch`` or ``global``.
    """

    def __init__(self, mode: NormalizationMode) -> None:
        self._mode = mode
        self._running = _Spread()

    def __call__(self, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Divide one step's advantages; call it once per optimizer step.

        Args:
            advantages: ``[N]``, of the whole step.
            loss_mask: ``[N]``; a token is trained where it is not 0.

        Returns:
            ``[N]``, of the dtype of its input; under ``none`` the very same tensor.
        """
        if self._mode == "none":
            return advantages
        spread = _spread_of(advantages[loss_mask != 0].to(torch.float64))
        if self._mode == "global":
            spread = self._running = self._running.merged_with(spread)
        return (advantages.to(torch.float64) / spread.divisor).to(advantages.dtype)

    def state_dict(self) -> dict[str, float]:
        """The running sums of ``global``, JSON-able."""
        return asdict(self._running)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            CheckpointError: if the state lacks a number, or holds one that cannot be.
        """
        values: dict[str, float] = {}
        for name in self.state_dict():
            value = state.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise CheckpointError(
                    f"advantage normalizer state has {name} = {value!r}, not a finite number: "
                    "the checkpoint is damaged; resume from an older one"
                )
            values[name] = float(value)
        if values["count"] < 0 or values["sum_of_squared_deviations"] < 0:
            raise CheckpointError(
                f"advantage normalizer state has a negative count or sum of squares ({values}): "
                "the checkpoint is damaged; resume from an older one"
            )
        self._running = _Spread(**values)


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """Count, mean and sum of squared deviations: the form in which long sums keep their digits."""

    count: float = 0.0
    mean: float = 0.0
    sum_of_squared_deviations: float = 0.0

    def merged_with(self, other: _Spread) -> _Spread:
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        return _Spread(
            count=count,
            mean=self.mean + shift * other.count / count,
            sum_of_squared_deviations=self.sum_of_squared_deviations
            + other.sum_of_squared_deviations
            + shift * shift * self.count * other.count / count,
        )

    @property
    def divisor(self) -> float:
        """The standard deviation; 1.0 where there is none to speak of."""
        if not self.count:
            return 1.0
        variance = self.sum_of_squared_deviations / self.count
        root_mean_square = math.sqrt(variance + self.mean * self.mean)
        deviation = math.sqrt(variance)
        return deviation if deviation > _NO_SPREAD * root_mean_square else 1.0


def _spread_of(values: Tensor) -> _Spread:
    """Spread of a step's trained advantages, [N] float64."""
    count = float(values.numel())
    if not count:
        return _Spread()
    mean = float(values.sum()) / count
    squares = float(values.square().sum())
    return _Spread(count=count, mean=mean, sum_of_squared_deviations=max(0.0, squares - count * mean * mean))
