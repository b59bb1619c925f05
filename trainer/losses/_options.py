"""The options of the losses and the values they may take: one table for every loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from trainer.errors import ConfigurationError

_SMALLEST_CAP = 1e-6
"""A weight capped at 0 would train on nothing."""

_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "kl_coefficient": (0.0, math.inf),
        "ratio_cap": (_SMALLEST_CAP, math.inf),
        "epsilon_low": (0.0, 1.0),
        "epsilon_high": (0.0, math.inf),
    }
)


def check_options(**options: float) -> None:
    """Refuse an option that is not a finite number in its range.

    Raises:
        ConfigurationError: naming the option, its value, and what is allowed.
    """
    for name, value in options.items():
        lowest, highest = _RANGES[name]
        if not (math.isfinite(value) and lowest <= value <= highest):
            raise ConfigurationError(
                f"loss option {name} is {value}; allowed are finite numbers from {lowest:g} to {highest:g}"
            )
