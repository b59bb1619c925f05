"""The picture of docs/performance.md: seconds of one step, case by case, ours beside the others'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.step._summary import Summary, summarize

__all__ = ["draw"]

_INK = "#22303c"
_FAINT = "#9aa7b2"
_OURS = "#d1691c"
_PEER = "#2a78b8"
_FLOOR = "#b9c3cb"
_ORDER = ("floor", "ours", "recomputing", "trl", "padding", "example-trainer-stored", "example-trainer")
_LABELS = {
    "floor": "floor",
    "ours": "ours",
    "recomputing": "ours,\nrecomputing",
    "trl": "TRL",
    "padding": "padding",
    "example-trainer-stored": "example trainer",
    "example-trainer": "example trainer,\nrecomputing",
}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a run, dtypes across and cases down, as a PNG.

    Args:
        runs: As in the JSON of `benchmarks.step`; at least one.
        path: Where to write.
    """
    if not runs:
        return
    cases = sorted({run["case"] for run in runs})
    dtypes = [dtype for dtype in ("float32", "bfloat16") if any(run["dtype"] == dtype for run in runs)]
    figure = Figure(figsize=(5.0 * len(dtypes) + 0.6, 2.4 * len(cases) + 0.6), dpi=160, layout="constrained")
    figure.suptitle("One training step, forward and backward · x: times ours", fontsize=10, color=_INK)
    grid = figure.subplots(len(cases), len(dtypes), squeeze=False)
    for row, case in enumerate(cases):
        for column, dtype in enumerate(dtypes):
            found = [run for run in runs if run["case"] == case and run["dtype"] == dtype]
            if found:
                _panel(grid[row][column], found[-1])
            else:
                grid[row][column].set_axis_off()
    FigureCanvasAgg(figure)  # a canvas without a window, whatever the machine has
    figure.savefig(path, format="png")


def _panel(axes: Axes, run: dict[str, Any]) -> None:
    summaries = {summary.name: summary for summary in summarize(run) if summary.seconds is not None}
    bars: list[Summary] = [summaries[name] for name in _ORDER if name in summaries]
    seconds = [summary.seconds or 0.0 for summary in bars]
    colours = [
        {"floor": _FLOOR, "ours": _OURS, "recomputing": _OURS}.get(summary.name, _PEER) for summary in bars
    ]
    places = range(len(bars))
    axes.barh(places, seconds, color=colours, height=0.66)
    for place, summary in zip(places, bars, strict=True):
        ratio = f" · {summary.times_ours:.1f}x" if summary.times_ours and summary.name != "ours" else ""
        axes.annotate(
            f"{summary.seconds:.2f} s{ratio}",
            (summary.seconds or 0.0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
        )
    axes.set_yticks(places, [_LABELS[summary.name] for summary in bars], fontsize=8, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds) * 1.34)  # room for the longest bar's numbers
    axes.set_xlabel("seconds", fontsize=8, color=_INK)
    axes.set_title(f"{run['case']} · {run['dtype']}\n{run['title']}", loc="left", fontsize=8.5, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(axis="x", color=_FAINT, alpha=0.25)
    axes.set_axisbelow(True)
