"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], *, width: int, low: float = 0.0, high: float = 1.0) -> str:
    """Draw `values` as at most `width` bars between `low` and `high`; more values are averaged.

    >>> curve([0.0, 0.5, 1.0], width=10)
    '▁▅█'
    """
    shown = _averaged(values, width) if len(values) > width else list(values)
    return "".join(_BARS[_level((value - low) / (high - low))] for value in shown)


def _level(share: float) -> int:
    return min(len(_BARS) - 1, max(0, int(share * len(_BARS))))


def _averaged(values: Sequence[float], count: int) -> list[float]:
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
