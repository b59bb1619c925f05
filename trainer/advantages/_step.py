"""Scaling and clipping the advantages of a whole optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.errors import CheckpointError, ConfigurationError, ShapeMismatchError

NormalizationMode = Literal["none", "batch", "global"]
"""The values of ``data.advantage_normalization``."""

_NO_SPREAD = 1e-6
"""A standard deviation below this share of the root mean square is rounding: advantages stay undivided."""


@dataclass(frozen=True, kw_only=True)
class AdvantageMoments:
    """What a process says of its share of a step: three sums, float64, that add up over processes."""

    count: float = 0.0
    """Trained tokens."""
    total: float = 0.0
    """Sum of their advantages."""
    total_of_squares: float = 0.0
    """Sum of the squares of their advantages."""

    def __add__(self, other: AdvantageMoments) -> AdvantageMoments:
        return AdvantageMoments(
            count=self.count + other.count,
            total=self.total + other.total,
            total_of_squares=self.total_of_squares + other.total_of_squares,
        )

    @property
    def mean(self) -> float:
        """Mean advantage; 0 of no tokens."""
        return self.total / self.count if self.count else 0.0

    @property
    def sum_of_squared_deviations(self) -> float:
        """Sum of ``(advantage - mean)²``."""
        return max(0.0, self.total_of_squares - self.count * self.mean * self.mean)


Reducer = Callable[[AdvantageMoments], AdvantageMoments]
"""Adds one process's moments to those of the others, e.g. an all-reduce of three float64 numbers."""


def measure_advantages(advantages: Sequence[Tensor], loss_masks: Sequence[Tensor]) -> AdvantageMoments:
    """Sum up the advantages of the trained tokens.

    Args:
        advantages: One ``[T]`` per sequence.
        loss_masks: The same shapes; a token is trained where it is not 0.

    Raises:
        ShapeMismatchError: if a mask has another shape than its advantages.
    """
    _refuse_unequal_shapes(advantages, loss_masks)
    trained = [row.to(torch.float64)[mask != 0] for row, mask in zip(advantages, loss_masks, strict=True)]
    values = torch.cat(trained) if trained else torch.zeros(0, dtype=torch.float64)
    return AdvantageMoments(
        count=float(values.numel()), total=float(values.sum()), total_of_squares=float(values.square().sum())
    )


class AdvantageNormalizer:
    """Divides a step's advantages by their standard deviation over trained tokens; never shifts them.

    Not shifting keeps what a zero means: a group without spread, or a sequence that its environment set to
    zero, is neither rewarded nor punished for how the rest of the step went.

    ``batch`` takes the standard deviation of this step. ``global`` takes that of every step so far, this one
    included, accumulated by Welford's method in its parallel form (Chan et al. 1983): steadier, for small
    steps. ``none`` returns the advantages as they came.

    Call it once per optimizer step; with several processes, on each of them in the same step, and the reducer
    makes them divide by the same number.

    Args:
        mode: ``none``, ``batch`` or ``global``.
        reduce: Adds the moments of all processes; None for a single process.

    Raises:
        ConfigurationError: if there is no such mode.
    """

    def __init__(self, mode: NormalizationMode, *, reduce: Reducer | None = None) -> None:
        if mode not in get_args(NormalizationMode):
            raise ConfigurationError(
                f"advantage normalization is {mode!r}; allowed are {', '.join(get_args(NormalizationMode))}"
            )
        self._mode = mode
        self._reduce = reduce
        self._running = _RunningSpread()

    def __call__(self, advantages: Sequence[Tensor], loss_masks: Sequence[Tensor]) -> list[Tensor]:
        """Return one step's advantages, divided.

        Args:
            advantages: One ``[T]`` per sequence of this process's share of the step.
            loss_masks: The same shapes; a token is trained where it is not 0.

        Returns:
            One ``[T]`` per sequence, each with the dtype of its input; under ``none`` the very same tensors.

        Raises:
            ShapeMismatchError: if a mask has another shape than its advantages.
        """
        if self._mode == "none":
            _refuse_unequal_shapes(advantages, loss_masks)
            return list(advantages)
        moments = measure_advantages(advantages, loss_masks)
        divisor = self.divisor(moments if self._reduce is None else self._reduce(moments))
        return [(row.to(torch.float64) / divisor).to(row.dtype) for row in advantages]

    def divisor(self, moments: AdvantageMoments) -> float:
        """Take in the moments of a whole step, all processes together, and say what to divide it by.

        1.0 where there is no spread to divide by: under ``none``, without trained tokens, and where all
        advantages are equal.
        """
        if self._mode == "none":
            return 1.0
        if self._mode == "batch":
            return _RunningSpread().merged_with(moments).divisor
        self._running = self._running.merged_with(moments)
        return self._running.divisor

    def state_dict(self) -> dict[str, float]:
        """The running sums of ``global``, JSON-able."""
        return {
            "count": self._running.count,
            "mean": self._running.mean,
            "sum_of_squared_deviations": self._running.sum_of_squared_deviations,
        }

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
        self._running = _RunningSpread(**values)


def clip_advantages(advantages: Sequence[Tensor], low: float, high: float) -> list[Tensor]:
    """Hold every advantage between ``low`` and ``high``.

    Args:
        advantages: One ``[T]`` per sequence.
        low: At most 0, so that a zero stays a zero.
        high: At least 0, and more than ``low``.

    Raises:
        ConfigurationError: if the bounds are not in that order.
    """
    if not (low <= 0.0 <= high and low < high):
        raise ConfigurationError(
            f"advantages cannot be clipped to [{low}, {high}]; the bounds must enclose 0, e.g. [-5, 5]"
        )
    return [row.clamp(low, high) for row in advantages]


@dataclass(frozen=True, kw_only=True)
class _RunningSpread:
    """Count, mean and sum of squared deviations: the form in which long sums keep their digits."""

    count: float = 0.0
    mean: float = 0.0
    sum_of_squared_deviations: float = 0.0

    def merged_with(self, moments: AdvantageMoments) -> _RunningSpread:
        count = self.count + moments.count
        if not count:
            return self
        shift = moments.mean - self.mean
        return _RunningSpread(
            count=count,
            mean=self.mean + shift * moments.count / count,
            sum_of_squared_deviations=self.sum_of_squared_deviations
            + moments.sum_of_squared_deviations
            + shift * shift * self.count * moments.count / count,
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


def _refuse_unequal_shapes(advantages: Sequence[Tensor], loss_masks: Sequence[Tensor]) -> None:
    ours, theirs = [[list(row.shape) for row in rows] for rows in (advantages, loss_masks)]
    if ours != theirs:
        raise ShapeMismatchError(f"advantages have shapes {ours}, loss masks {theirs}; they must be equal")
